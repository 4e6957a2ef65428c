"""Tasks whose rows are parquet files on the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet

from nanochat import paths
from nanochat.data.download import HubFile, fetch
from nanochat.errors import UserError
from nanochat.tasks.task import Task

ROWS_IN_FINGERPRINT = 100


class ParquetRows(Sequence[dict[str, Any]]):
    """The rows of several files with one schema, in Arrow's memory: a tenth of what Python objects would take."""

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = []
        for path in paths:
            try:
                tables.append(pyarrow.parquet.read_table(path))
            except (OSError, pyarrow.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"cannot read {path} ({reason}): run ./prepare.sh --verify") from None
        self._table = pyarrow.concat_tables(tables).combine_chunks()  # one chunk per column: row access in O(1)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]  # IndexError past the end


class HubTask(Task):
    """A task that builds its conversations from `self.rows`."""

    REPOSITORY: ClassVar[str]
    FILES: ClassVar[Mapping[Any, Sequence[str]]]
    """file names by split"""

    def __init__(self, split: Any) -> None:
        """Downloads the files unless they are there. Raises UserError if that fails."""
        files = self.fetch(split)
        self.digests = [file.sha256 for file in files]
        self.rows = ParquetRows([self._folder() / file.name for file in files])

    @classmethod
    def fetch(cls, split: Any, *, verify: bool = False) -> list[HubFile]:
        """Download the files of a split to data/<name of the repository>. Raises UserError if that fails."""
        return fetch(cls.REPOSITORY, cls.FILES[split], cls._folder(), verify=verify)

    @classmethod
    def _folder(cls) -> Path:
        return paths.data_dir(cls.REPOSITORY.split("/")[1])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' digests and the first conversations: fast for half a million rows."""
        head = self[:ROWS_IN_FINGERPRINT]
        return hashlib.sha256(json.dumps([self.name, len(self), self.digests, head]).encode()).hexdigest()
