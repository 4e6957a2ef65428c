"""Tasks whose rows are parquet files on the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.data.downloads import fetch
from nanochat.data.manifest import HubFile
from nanochat.data.parquet import ParquetRows
from nanochat.tasks.task import Task

ROWS_IN_FINGERPRINT = 100


@dataclass(frozen=True)
class HubFiles:
    """Some files of a data set repository, the rows of one split."""

    repository: str
    names: Sequence[str]

    def fetch(self, *, verify: bool = False) -> list[HubFile]:
        """Bring them to data/<name of the repository>, where they are missing. Raises UserError if it cannot."""
        return fetch(self.repository, self.names, self._folder, verify=verify)

    def rows(self) -> ParquetRows:
        """Their rows, end to end."""
        return ParquetRows([self._folder / name for name in self.names])

    @property
    def _folder(self) -> Path:
        return paths.data_dir(self.repository.split("/")[1])


class HubTask(Task):
    """A task that makes its conversations from `self.rows`."""

    def __init__(self, files: HubFiles) -> None:
        """Fetches the files, where they are missing. Raises UserError if it cannot."""
        self.digests = [file.sha256 for file in files.fetch()]
        self.rows: Sequence[dict[str, Any]] = files.rows()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files and of what is made of their first rows: quick for half a million of them."""
        first = self[:ROWS_IN_FINGERPRINT]
        return hashlib.sha256(json.dumps([self.name, len(self), self.digests, first]).encode()).hexdigest()
