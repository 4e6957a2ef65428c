"""Tasks whose rows are parquet files on the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from nanochat import paths
from nanochat.data.download import HubFile, fetch
from nanochat.errors import UserError
from nanochat.tasks.task import Task

ROWS_IN_FINGERPRINT = 100


@dataclass(frozen=True)
class HubFiles:
    """The files of one split of a dataset repository."""

    repository: str
    names: Sequence[str]

    def fetch(self, *, verify: bool = False) -> list[HubFile]:
        """Download them to data/<name of the repository> unless they are there. Raises UserError if that fails."""
        return fetch(self.repository, self.names, self.folder, verify=verify)

    @property
    def folder(self) -> Path:
        """Download folder."""
        return paths.data_dir(self.repository.split("/")[1])


class ParquetRows(Sequence[dict[str, Any]]):
    """The rows of several files with one schema. The files are read at the first access to a row.

    The rows stay in Arrow's memory, a tenth of what they take as Python objects.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    @cached_property
    def _table(self) -> pyarrow.Table:
        # One chunk per column: a row is found in constant time.
        return pyarrow.concat_tables(_read(pyarrow.parquet.read_table, path) for path in self.files).combine_chunks()

    @cached_property
    def _length(self) -> int:
        return sum(_read(pyarrow.parquet.read_metadata, path).num_rows for path in self.files)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._table.slice(index, 1).to_pylist()[0]


def _read(read: Any, path: Path) -> Any:
    try:
        return read(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}): run ./prepare.sh --verify") from None


class HubTask(Task):
    """A task that builds its conversations from `self.rows`."""

    def __init__(self, files: HubFiles) -> None:
        """Downloads the files unless they are there. Raises UserError if that fails."""
        self.digests = [file.sha256 for file in files.fetch()]
        self.rows: Sequence[dict[str, Any]] = ParquetRows([files.folder / name for name in files.names])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' digests and the first conversations: fast for half a million rows."""
        head = self[:ROWS_IN_FINGERPRINT]
        return hashlib.sha256(json.dumps([self.name, len(self), self.digests, head]).encode()).hexdigest()
