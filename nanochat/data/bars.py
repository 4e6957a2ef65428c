"""How far a long piece of work is: a bar on a terminal, a line now and then in a log file."""

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

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

SECONDS_BETWEEN_LINES = 30.0

Item = TypeVar("Item")


class Bar:
    """A context manager; `advance` may be called from any thread."""

    def __init__(self, title: str, total: int, *, in_bytes: bool = False) -> None:
        self.title = title
        self.total = total
        self.in_bytes = in_bytes
        self.done = 0
        self._lock = threading.Lock()
        self._said = time.monotonic()
        console = Console()
        middle: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
        columns = [TextColumn("{task.description}"), BarColumn(), *middle, TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._progress.add_task(title, total=total) if self._progress else None

    def __enter__(self) -> "Bar":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Note that `count` more are done; fewer than 0 where something has to be done again."""
        with self._lock:
            self.done += count
            if self._progress and self._task is not None:
                self._progress.advance(self._task, count)
            elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
                self._said = time.monotonic()
                print(f"{self.title}: {self._figure(self.done)} of {self._figure(self.total)}", flush=True)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, counted as they are taken."""
        for item in items:
            yield item
            self.advance()

    def _figure(self, count: int) -> str:
        return f"{count / 1e9:.2f} GB" if self.in_bytes else f"{count:,}"
