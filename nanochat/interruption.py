"""Ctrl-C and SIGTERM as a request to stop at the end of the step, not in the middle of it."""

import signal
from types import FrameType
from typing import Any


class Interruption:
    """A context manager within which the first SIGINT or SIGTERM only sets `requested`.

    A second Ctrl-C raises KeyboardInterrupt at once. Usable from the main thread alone, as all signal handling is.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # torchrun sends SIGTERM after the terminal's SIGINT; only a second SIGINT is a person in a hurry.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
