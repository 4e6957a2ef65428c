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
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A supervisor may send SIGTERM to every process, and torchrun pass its own on: a second one means nothing. But
        # whoever pressed Ctrl-C and does so again is in a hurry. Processes that torchrun started have no terminal: it
        # passes the first Ctrl-C on as SIGINT and the second as SIGTERM.
        if self._interrupted:
            raise KeyboardInterrupt
        self.requested = True
        self._interrupted = number == signal.SIGINT
