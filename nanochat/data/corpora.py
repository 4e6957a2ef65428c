"""The texts to pretrain on, by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from nanochat.data import embedded


class Corpus(Protocol):
    """Text in two parts that never mix."""

    name: str

    def origin(self) -> str:
        """What identifies exactly this text, so that token files made from other text are noticed."""

    def texts(self, split: str) -> Iterator[str]:
        """The documents of `train` or `val`."""


@dataclass(frozen=True)
class Encyclopedia:
    """The embedded default: leads of Wikipedia's vital articles, five million characters, no download."""

    name: str = "encyclopedia"

    def origin(self) -> str:
        """The package and its version."""
        return embedded.ENCYCLOPEDIA_ORIGIN

    def texts(self, split: str) -> Iterator[str]:
        """Title and lead of each article."""
        return iter(embedded.documents("train" if split == "train" else "val"))
