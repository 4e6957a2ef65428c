"""Work with a progress bar on a terminal, or a line every half minute in a log file."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

from nanochat.errors import UserError
from nanochat.units import format_bytes

SECONDS_BETWEEN_LINES = 30.0

Advance = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


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


def in_processes(
    title: str, function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> list[Result]:
    """Call `function` on every item, in one process per core or `workers`. Raises UserError if one is killed."""
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers < 2:
        return [function(item) for item in track(title, items, len(items))]
    # Spawned, not forked: torch and the downloads have started threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in track(title, as_completed(futures), len(futures)):
                future.result()  # raises the first error
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                f"a process that was {title} was killed (possibly out of memory): run ./prepare.sh again to continue "
                "with the rest"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
