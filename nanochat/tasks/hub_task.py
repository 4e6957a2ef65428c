"""Tasks whose rows are parquet files on the Hugging Face Hub."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet

from nanochat import paths
from nanochat.conversation_files import convert, find_problem
from nanochat.conversations import Conversation
from nanochat.data.download import HubFile, fetch
from nanochat.errors import UserError, one_line
from nanochat.tasks.task import Task
from nanochat.untrusted import reading

ROWS_IN_FINGERPRINT = 100


def read_parquet(paths: Sequence[Path]) -> pyarrow.Table:
    """Read several files of one schema. An Arrow table takes a tenth of the memory of Python objects."""
    tables = []
    for path in paths:
        with reading(path, "run ./prepare.sh --verify"):
            tables.append(pyarrow.parquet.read_table(path))
    return pyarrow.concat_tables(tables).combine_chunks()  # one chunk per column: row access in O(1)


class HubTask(Task):
    """A task that builds its conversations from `self.source(index)`."""

    REPOSITORY: ClassVar[str]
    FILES: ClassVar[Mapping[Any, Sequence[str]]]  # file names by split

    def __init__(self, split: Any) -> None:
        """Downloads the files unless they exist. Raises UserError if that fails."""
        files = self.fetch(split)
        self.digests = [file.sha256 for file in files]
        self._table = read_parquet([self._folder() / file.name for file in files])

    @classmethod
    def fetch(cls, split: Any, *, verify: bool = False) -> list[HubFile]:
        """Download the files of a split to data/<name of the repository>. Raises UserError if that fails."""
        return fetch(cls.REPOSITORY, cls.FILES[split], cls._folder(), verify=verify)

    @classmethod
    def _folder(cls) -> Path:
        return paths.data_dir(cls.REPOSITORY.split("/")[1])

    def __len__(self) -> int:
        return self._table.num_rows

    def source(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' digests and the first conversations: fast for half a million rows."""
        head = list(islice(self, ROWS_IN_FINGERPRINT))
        return hashlib.sha256(json.dumps([self.name, len(self), self.digests, head]).encode()).hexdigest()


class HubConversations(Task):
    """The training conversations of any dataset on the hub, in any format that nanochat.conversations reads."""

    def __init__(self, name: str) -> None:
        """`name`: owner/name or owner/name/config. Rows that are not conversations are counted and left out.

        Raises UserError if the download fails or no row is left.
        """
        import datasets  # takes a second

        self.name = name
        owner, repository, *config = name.split("/")
        where = f"{owner}/{repository}", *config
        try:
            splits = datasets.get_dataset_split_names(*where)
            split = next((split for split in splits if split.startswith("train")), splits[0])
            self._data = datasets.load_dataset(*where, split=split, cache_dir=str(paths.data_dir("hub")))
        except Exception as error:  # of the hub, the network, the disk, or a format
            raise UserError(f"cannot load {name}, as a file or from the hub ({one_line(error)})") from error
        problems = {i: problem for i, row in enumerate(self._data) if (problem := find_problem(convert(row)))}
        self._rows = [i for i in range(len(self._data)) if i not in problems]
        first = next((f" (row {row}: {problem})" for row, problem in problems.items()), "")
        note = f"{len(problems):,} of {len(self._data):,} rows of {name} are invalid{first}"
        if not self._rows:
            raise UserError(f"{note}: choose another dataset")
        if problems and os.environ.get("RANK", "0") == "0":  # one of the processes of a run
            print(f"note: {note}, left out", flush=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        return convert(self._data[self._rows[index]])


class SmolTalk(HubTask):
    """460K conversations, some with a system message, for small models (https://arxiv.org/abs/2502.02737)."""

    name = "smoltalk"
    REPOSITORY = "HuggingFaceTB/smol-smoltalk"
    FILES: ClassVar = {
        "train": [f"data/train-{i:05d}-of-00004.parquet" for i in range(4)],
        "test": ["data/test-00000-of-00001.parquet"],
    }

    def __getitem__(self, index: int) -> Conversation:
        messages = self.source(index)["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
