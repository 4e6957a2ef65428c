"""What a stage cost in electricity: by the power that the user names, else as far as the GPUs tell."""

from nanochat.report.history import Stage
from nanochat.spark.replan import PlannedStage
from nanochat.spark.tariff import Tariff

JOULES_PER_KWH = 3.6e6


def kilowatt_hours(stage: Stage, tariff: Tariff) -> float | None:
    """Energy of a stage; None where neither the user named a power nor the GPUs of the main machine measure theirs.

    A named power is that of a whole machine, and counts for each that took part.
    """
    if tariff.watts is not None:
        return tariff.watts * stage.facts.get("machines", 1) * stage.seconds / JOULES_PER_KWH
    measured = stage.last("energy_j")
    return None if measured is None else measured / JOULES_PER_KWH


def planned_kilowatt_hours(planned: PlannedStage, machines: int, tariff: Tariff) -> float | None:
    """The same of a plan: by the power that the user names now, else by the one that was planned with."""
    return planned.kwh if tariff.watts is None else tariff.watts * machines * planned.hours / 1000
