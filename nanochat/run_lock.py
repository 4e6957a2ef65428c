"""One run at a time on a model."""

import fcntl
import os
import platform
from pathlib import Path

from nanochat import paths

_held: dict[Path, int] = {}


def hold(source: str, tag: str) -> str | None:
    """Take the lock of a stage's model for as long as this process lives.

    Returns None if this process has it now, else who has it, such as `process 1234 on spark`. The kernel frees the
    lock when its process ends, however that comes, so there is none to be left behind.
    """
    folder = paths.locks_dir()
    folder.mkdir(exist_ok=True)
    path = folder / f"{source}-{tag}.lock"
    if path in _held:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with os.fdopen(descriptor) as file:
            return file.read().strip() or "another process"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held[path] = descriptor
    return None
