"""A progress bar on a terminal, or a line every half minute in a log file."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

from nanochat.units import format_bytes

SECONDS_BETWEEN_LINES = 30.0

Advance = Callable[[int], None]
Item = TypeVar("Item")


@contextmanager
def progress_bar(title: str, total: int, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Yield `advance(count)`, which any thread may call; a negative count is work that must be repeated."""
    console = Console()
    counts = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    text, bar, _, remaining = Progress.get_default_columns()
    format_count = format_bytes if in_bytes else "{:,}".format
    done, printed_at, lock = 0, time.monotonic(), threading.Lock()
    with Progress(
        text, bar, *counts, remaining, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done, printed_at
            with lock:
                done += count
                if console.is_terminal:
                    progress.advance(task, count)
                elif time.monotonic() - printed_at > SECONDS_BETWEEN_LINES:
                    printed_at = time.monotonic()
                    print(f"{title}: {format_count(done)} of {format_count(total)}", flush=True)

        yield advance


def track(title: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    with progress_bar(title, total) as advance:
        for item in items:
            yield item
            advance(1)
