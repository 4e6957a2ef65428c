"""What a stage cost in electricity: measured where the machine can tell, else by a power that the user names."""

import os
from dataclasses import dataclass

from nanochat.errors import UserError
from nanochat.report.history import Stage

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Tariff:
    """What the user says of power and price, in NANOCHAT_WATTS and NANOCHAT_PRICE_PER_KWH; None where not said."""

    watts: float | None = None
    price_per_kwh: float | None = None

    @classmethod
    def from_environment(cls) -> "Tariff":
        """Raises UserError if one of the variables is no number."""
        return cls(_number("NANOCHAT_WATTS"), _number("NANOCHAT_PRICE_PER_KWH"))

    def explanation(self) -> str:
        """Where the energy is from, or how to have it."""
        if self.watts is None:
            return "This machine does not measure its power: with NANOCHAT_WATTS=240 energy is worked out."
        return f"Energy is the time at {self.watts:g} W, as NANOCHAT_WATTS says."


def _number(variable: str) -> float | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{variable}={text} is no number: set it to one such as {variable}=0.3, or unset it") from None


def kilowatt_hours(stage: Stage, tariff: Tariff) -> float | None:
    """Energy of a stage; None where neither the machine measures its power nor the user named one."""
    measured = stage.last("energy_j")
    if measured is not None:
        return measured / JOULES_PER_KWH
    return None if tariff.watts is None else tariff.watts * stage.seconds / JOULES_PER_KWH
