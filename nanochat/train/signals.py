"""What a person may ask of a run by a signal: to stop, to save, or, by closing the terminal, nothing at all."""

import signal
from types import FrameType
from typing import Any


class StopAskedError(Exception):
    """What was being done is left by every process, for one of them was asked to stop."""


class Interruption:
    """A context manager within which signals are requests, met at the end of the step or in its evaluation.

    The first SIGINT or SIGTERM sets `stop`, SIGUSR1 sets `save`, and SIGHUP, which the end of a terminal or of a
    connection sends, does nothing. A second Ctrl-C raises KeyboardInterrupt at once. Usable from the main thread alone,
    as all signal handling is.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        handlers: dict[signal.Signals, Any] = {
            signal.SIGINT: self._on_stop,
            signal.SIGTERM: self._on_stop,
            signal.SIGUSR1: self._on_save,
            signal.SIGHUP: signal.SIG_IGN,
        }
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requests(self) -> tuple[bool, bool]:
        """Whether to stop, and whether it was asked to save since this was last called."""
        save, self.save = self.save, False
        return self.stop, save

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # A supervisor may send SIGTERM to every process, and torchrun pass its own on: a second one means nothing. But
        # whoever pressed Ctrl-C and does so again is in a hurry. Processes that torchrun started have no terminal: it
        # passes the first Ctrl-C on as SIGINT and the second as SIGTERM.
        if self._interrupted:
            raise KeyboardInterrupt
        self.stop = True
        self._interrupted = number == signal.SIGINT

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
