"""What a stage cost in electricity: measured where the machine can tell, else by a power that the user names."""

from nanochat.machine.tariff import Tariff
from nanochat.report.history import Stage

JOULES_PER_KWH = 3.6e6


def kilowatt_hours(stage: Stage, tariff: Tariff) -> float | None:
    """Energy of a stage; None where neither the machine measures its power nor the user named one."""
    measured = stage.last("energy_j")
    if measured is not None:
        return measured / JOULES_PER_KWH
    return None if tariff.watts is None else tariff.watts * stage.seconds / JOULES_PER_KWH
