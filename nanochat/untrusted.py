"""Read files from elsewhere, which may be damaged or malicious."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from nanochat.errors import UserError, one_line

MAX_JSON_BYTES = 1 << 28
MAX_LINE_BYTES = 64_000_000  # of JSON Lines
MAX_NUMBER = 1e30  # larger ones are damage, and their sums overflow


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Convert any error in the block, which reads `path`, to a UserError: `cannot read <path> (<reason>): <fix>`.

    A malformed file can raise anything, such as RecursionError or a panic of a library in Rust, which is not an
    Exception. A pipe or a device is refused before the block, which might wait for it forever.
    """
    try:
        check_regular(path)
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, FileNotFoundError):
            reason = f"{Path(error.filename or path).name} is missing"
        else:
            reason = one_line(error)
        raise UserError(f"cannot read {path} ({reason}): {fix}") from error


def check_regular(path: Path) -> None:
    """Raise ValueError for a pipe, socket or device, reading which may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path.name} is not a regular file")


def read_json(path: Path) -> Any:
    """Parse a JSON file of at most 256 MB. Call it inside `reading`: a malformed file can raise anything."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes of JSON")
    return json.loads(path.read_bytes())


def skip_line(file: BinaryIO, limit: int = sys.maxsize) -> int:
    """Read to the end of the line, or about `limit` bytes, in little memory. Return how many bytes were read."""
    count = 0
    while count < limit and (rest := file.readline(1 << 20)):
        count += len(rest)
        if rest.endswith(b"\n"):
            break
    return count


def check_types(value: Any, types: Mapping[str, type | UnionType]) -> None:
    """Raise ValueError unless `value` is a dict whose entries have these types; no number may be negative.

    An int may stand for a float.
    """
    for name, kind in types.items():
        entry = value.get(name) if isinstance(value, dict) else ...
        if not isinstance(entry, kind) and not (isinstance(entry, int) and isinstance(0.0, kind)):
            raise ValueError(f'"{name}" is missing or invalid')
        if isinstance(entry, int | float) and not 0 <= entry <= MAX_NUMBER:
            raise ValueError(f'"{name}" is out of range: {entry}')


def number(value: object) -> float | None:
    """`value` as a float if it is a finite number of a plausible size, else None."""
    if isinstance(value, int | float) and abs(value) <= MAX_NUMBER:  # false for NaN
        return float(value)
    return None
