"""The text to pretrain on: numbered parquet shards on the Hugging Face Hub, or the demo's encyclopedia.

To add a dataset of the same layout, add its name to DatasetName and a line to DATASETS.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.download import HubFile, fetch
from nanochat.data.token_files import TextShard
from nanochat.errors import UserError

DatasetName = Literal["fineweb-edu", "climbmix", "encyclopedia"]

SHARD_CHARS = 250_000_000
CHARS_PER_TOKEN = 4.8  # English prose with a vocabulary of 65,536
TOKENS_PER_PARAMETER = 20
SPARE = 1.1  # shards differ in length: 10% more than needed keeps a run within one epoch


@dataclass(frozen=True)
class TextDataset:
    """Text in two disjoint splits, `train` and `val`, each in shards."""

    name: str  # name of its folders
    splits: Mapping[str, Sequence[TextShard]]

    def texts(self, split: str) -> Iterator[str]:
        for shard in self.splits[split]:
            yield from shard.texts()


def encyclopedia(name: str = "encyclopedia") -> TextDataset:
    """Leads of Wikipedia's vital articles, five million characters, without a download."""
    splits: tuple[demo_data.Split, ...] = ("val", "train")
    shards = (TextShard(split, demo_data.ENCYCLOPEDIA_ORIGIN, partial(demo_data.documents, split)) for split in splits)
    return TextDataset(name, {shard.name: [shard] for shard in shards})


def read_texts(path: Path) -> Iterator[str]:
    """Yield the column `text` of a parquet file, one row group in memory at a time. Raises UserError if damaged."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}): run ./prepare.sh --verify") from None


@dataclass(frozen=True)
class HubDataset:
    """Shuffled text in files shard_NNNNN.parquet."""

    name: DatasetName
    repository: str
    num_shards: int
    license: str

    def fetch(self, num_shards: int, *, verify: bool = False) -> list[HubFile]:
        """Download the first `num_shards` shards unless they exist. Raises UserError if that fails."""
        if not 2 <= num_shards <= self.num_shards:
            raise UserError(
                f"--num-shards must be between 2 (the first shard is for validation) and {self.num_shards} for "
                f"{self.name}, got {num_shards}"
            )
        names = [f"shard_{i:05d}.parquet" for i in range(num_shards)]
        # Token files take about as much disk space as the compressed text.
        return fetch(self.repository, names, paths.data_dir(self.name), verify=verify, disk_factor=2.0)

    def open(self, files: Sequence[HubFile]) -> TextDataset:
        """Open files from `fetch`. The first shard is `val`, since every run has it and the text is shuffled."""
        folder = paths.data_dir(self.name)
        shards = [TextShard(Path(f.name).stem, f.sha256, partial(read_texts, folder / f.name)) for f in files]
        return TextDataset(self.name, {"val": shards[:1], "train": shards[1:]})


FINEWEB_EDU = HubDataset("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1823, "ODC-By 1.0")
CLIMBMIX = HubDataset("climbmix", "karpathy/climbmix-400b-shuffle", 6543, "CC BY-NC 4.0, not for commercial use")
DATASETS: dict[str, HubDataset] = {dataset.name: dataset for dataset in (FINEWEB_EDU, CLIMBMIX)}


def shards_for_depth(depth: int, vocab_size: int) -> int:
    """Return the number of shards that a model of `depth` trains on in one epoch, plus validation; 240 for d20."""
    from nanochat.model.gpt import GPTConfig  # imports torch, which the tokenizing processes do not need

    parameters = GPTConfig.from_depth(depth, vocab_size, 2048).num_parameters
    needed = SPARE * TOKENS_PER_PARAMETER * parameters * CHARS_PER_TOKEN / SHARD_CHARS
    return math.ceil(needed / 8) * 8
