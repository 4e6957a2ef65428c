"""What the user says of power and its price, in the environment: NANOCHAT_WATTS and NANOCHAT_PRICE_PER_KWH."""

import os
from dataclasses import dataclass

from nanochat.errors import UserError


@dataclass(frozen=True)
class Tariff:
    """None where nothing was said."""

    watts: float | None = None
    """of a whole machine, of which GPUs measure a part only"""
    price_per_kwh: float | None = None
    """in the user's own currency"""

    @classmethod
    def from_environment(cls) -> "Tariff":
        """Raises UserError if one of the variables is no number."""
        return cls(_number("NANOCHAT_WATTS"), _number("NANOCHAT_PRICE_PER_KWH"))

    def explanation(self) -> str:
        """Where the energy is from, or how to have it."""
        if self.watts is None:
            return "Energy, if told, is that of this machine's GPUs alone: NANOCHAT_WATTS=120 names all of a machine."
        return f"Energy is the time at {self.watts:g} W for each machine, as NANOCHAT_WATTS says."


def _number(variable: str) -> float | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{variable}={text} is no number: set it to one such as {variable}=0.3, or unset it") from None
