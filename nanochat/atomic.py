"""Write files and folders that appear complete or not at all, even if the power fails."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends, and is removed if the block raises.

    The mode bits of a replaced file are kept. Two processes must not write the same path at once.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _drop_from_page_cache(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a temporary folder that becomes `path` when the block ends, and is removed if the block raises.

    Every file in it is on the disk before the folder gets its name. An existing folder that is not empty is replaced
    with `replace`, else FileExistsError or OSError is raised.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            fsync(entry)
        old = rename_away(path) if replace and path.exists() else None
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(path.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def rename_away(path: Path) -> Path:
    """Rename a folder to .<name>.old, so that a half-removed one is not mistaken for a complete one."""
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    return path.rename(old)


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk. File systems that cannot sync a folder (CIFS, 9p, FUSE) are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            _drop_from_page_cache(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT) or not path.is_dir():
            raise


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, which is then dropped from the page cache."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _drop_from_page_cache(file.fileno())
    return digest


def _drop_from_page_cache(descriptor: int) -> None:
    """Free the memory of a file that is on the disk and not needed soon. A GB10's GPU competes for it."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
