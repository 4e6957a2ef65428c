"""The texts to pretrain on, by name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nanochat import paths
from nanochat.data import embedded
from nanochat.data.manifest import HubFile
from nanochat.data.parquet import read_texts
from nanochat.data.token_shards import TextShard


class Corpus(Protocol):
    """Text in two parts that never mix, each in shards."""

    @property
    def name(self) -> str:
        """What its folders are called."""

    def shards(self, split: str) -> Sequence[TextShard]:
        """The parts of `train` or `val`, in order."""


def texts(corpus: Corpus, split: str) -> Iterator[str]:
    """The documents of `train` or `val`."""
    for shard in corpus.shards(split):
        yield from shard.texts()


@dataclass(frozen=True)
class EncyclopediaShard:
    """A split of the embedded encyclopedia."""

    name: str
    origin: str = embedded.ENCYCLOPEDIA_ORIGIN

    def texts(self) -> Iterator[str]:
        """Title and lead of each article."""
        return iter(embedded.documents("train" if self.name == "train" else "val"))


@dataclass(frozen=True)
class Encyclopedia:
    """The embedded default: leads of Wikipedia's vital articles, five million characters, no download."""

    name: str = "encyclopedia"

    def shards(self, split: str) -> Sequence[EncyclopediaShard]:
        """One a split."""
        return [EncyclopediaShard(split)]


@dataclass(frozen=True)
class ParquetShard:
    """A downloaded file of text."""

    path: Path
    origin: str
    """its sha256"""

    @property
    def name(self) -> str:
        """The file's, such as shard_00001."""
        return self.path.stem

    def texts(self) -> Iterator[str]:
        """The documents, in order."""
        return read_texts(self.path)


@dataclass(frozen=True)
class HubShards:
    """Downloaded shards of a data set. The first is val and no other, however many there are.

    The data sets are shuffled, so the first is like any other, and it is the one shard that every run has.
    """

    name: str
    files: Sequence[HubFile]
    """as `ShardedDataset.fetch` gives them"""

    def shards(self, split: str) -> Sequence[ParquetShard]:
        """A file each."""
        folder = paths.data_dir(self.name)
        files = self.files[:1] if split == "val" else self.files[1:]
        return [ParquetShard(folder / file.name, file.sha256) for file in files]
