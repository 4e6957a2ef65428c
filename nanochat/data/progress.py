"""A progress bar on a terminal, a line every half minute in a log file."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nanochat.units import format_bytes

SECONDS_BETWEEN_LINES = 30.0

Item = TypeVar("Item")


class ProgressBar:
    """A context manager. `advance` may be called from any thread."""

    def __init__(self, title: str, total: int, *, in_bytes: bool = False) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._format = format_bytes if in_bytes else "{:,}".format
        self._lock = threading.Lock()
        self._printed_at = time.monotonic()
        columns: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
        )
        console = Console()
        self._terminal = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Add `count` to what is done; negative if work has to be repeated."""
        with self._lock:
            self.done += count
            if self._terminal:
                self._progress.advance(self._task, count)
            elif time.monotonic() - self._printed_at > SECONDS_BETWEEN_LINES:
                self._printed_at = time.monotonic()
                print(f"{self.title}: {self._format(self.done)} of {self._format(self.total)}", flush=True)

    def count(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, advancing by one after each."""
        for item in items:
            yield item
            self.advance()
