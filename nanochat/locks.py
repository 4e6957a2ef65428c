"""Locks between processes. The operating system releases them when their holder ends, even by a crash."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_held: dict[Path, FileLock] = {}


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which must exist; wait if another process holds it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if os.environ.get("RANK", "0") == "0":  # one of the processes of a run
            print(f"waiting for another process that holds the lock on {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def hold(path: Path) -> str | None:
    """Hold the lock file `path` for as long as this process lives, without waiting.

    Returns None on success, else the holder, such as `process 1234 on spark`.
    """
    if path in _held:
        return None
    path.parent.mkdir(exist_ok=True)
    holder = path.with_suffix(".holder")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return holder.read_text().strip() if holder.exists() else "another process"
    holder.unlink(missing_ok=True)
    with suppress(OSError):  # a full disk
        holder.write_text(f"process {os.getpid()} on {platform.node()}\n")
    _held[path] = lock
    return None
