"""Signals as requests: stop, save, and SIGHUP, which is ignored."""

import signal
from types import FrameType
from typing import Any


class StopRequested(Exception):  # noqa: N818  # like KeyboardInterrupt
    """Ends an evaluation in every process because one of them was asked to stop."""


class SignalHandler:
    """A context manager that turns signals into requests, handled at the end of a step or within an evaluation.

    The first SIGINT or SIGTERM sets `stop`, SIGUSR1 sets `save`, and SIGHUP, sent when a terminal or a connection
    closes, is ignored. A second Ctrl-C raises KeyboardInterrupt at once. Main thread only, like all signal handling.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalHandler":
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

    def take_save(self) -> bool:
        """True if a save was requested since the last call."""
        save, self.save = self.save, False
        return save

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # A second SIGTERM means nothing: a supervisor may send one to every process while torchrun forwards its own. A
        # second Ctrl-C means stop now. Processes under torchrun have no terminal: it forwards the first Ctrl-C as
        # SIGINT and the second as SIGTERM.
        if self._interrupted:
            raise KeyboardInterrupt
        self.stop = True
        self._interrupted = number == signal.SIGINT

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
