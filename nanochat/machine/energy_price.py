"""What a user says of power and its price, in the environment: NANOCHAT_WATTS and NANOCHAT_PRICE_PER_KWH."""

import os

from nanochat.errors import UserError


def assumed_watts() -> float | None:
    """Power where none is measured."""
    return _number("NANOCHAT_WATTS")


def price_per_kwh() -> float | None:
    """In the user's own currency."""
    return _number("NANOCHAT_PRICE_PER_KWH")


def _number(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UserError(f"{name}={text} is not a number: set it to one such as 0.30, or unset it")
    return number
