"""Token files: one file of token ids per text shard, memory-mapped, read as one stream.

    <split>.shards.json                      the shards of a split, in order
    <shard>.ids  .offsets  [.mask]  .json    token ids; where documents start; 1 if a token is trained on; settings

Blocks are verified against their checksums when they are first read: hashing 20 GB before the first step would take as
long as reading it, and would miss later damage.
"""

import json
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 16
"""Unit of checksums. Verifying one takes 18 us (CRC-32 at 3.6 GB/s on one x86 core), 5 ms per step at depth 20."""


class CheckedArray:
    """A memory-mapped array, read by slices without a step, whose blocks are verified on first use."""

    def __init__(self, path: Path, dtype: np.dtype, length: int, checksums: list[int]) -> None:
        """Raises UserError if the file is missing or has another size."""
        self._path = path
        try:
            self._mapped: np.ndarray = np.memmap(path, dtype=dtype, mode="r")
        except (FileNotFoundError, ValueError):  # missing, or empty
            self._mapped = np.empty(0, dtype)
        if len(self._mapped) != length:
            raise UserError(f"{path} is damaged: delete that file and run ./prepare.sh, which writes it again")
        self._per_block = BLOCK_BYTES // dtype.itemsize
        self._checksums = checksums
        self._verified = np.zeros(len(checksums), bool)

    def __len__(self) -> int:
        return len(self._mapped)

    def __getitem__(self, span: slice) -> np.ndarray:
        """A slice of the file. Raises UserError if the data does not match its checksums."""
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("only slices without a step are supported")
        if stop > start:
            first, last = start // self._per_block, (stop - 1) // self._per_block
            for block in (first + np.flatnonzero(~self._verified[first : last + 1])).tolist():
                found = zlib.crc32(self._mapped[block * self._per_block : (block + 1) * self._per_block].data)
                if found != self._checksums[block]:
                    raise UserError(
                        f"{self._path} is damaged near byte {block * BLOCK_BYTES:,}: delete that file, run "
                        "./prepare.sh, which writes it again, and rerun this command"
                    )
                self._verified[block] = True
        return self._mapped[start:stop]


def checksums(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]


Ids = np.ndarray | CheckedArray  # anything that can be read by slices


@dataclass(frozen=True)
class TokenFile:
    """The token file of one shard, or of a mixture of conversations."""

    ids: Ids  # (N,) uint16 or uint32
    offsets: Ids  # (documents + 1,) int64: document i is ids[offsets[i] : offsets[i + 1]]
    mask: Ids | None  # (N,) uint8, 1 if the token is trained on; None if all are
    num_bytes: int  # raw bytes of the text, without special tokens
    origin: str = ""  # identifies the text
    counts: Mapping[str, int] = field(default_factory=dict)  # characters, and an estimate of letters by script

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def open(cls, folder: Path, name: str, tokenizer: Tokenizer) -> "TokenFile":
        """Map a token file. Raises UserError if it is missing, damaged or from another tokenizer."""
        try:
            settings = json.loads((folder / f"{name}.json").read_text())
            if settings["tokenizer"] != tokenizer.hash:
                raise UserError(f"the tokens in {folder} are from another tokenizer: run ./prepare.sh again")
            lengths = {"ids": settings["tokens"], "offsets": settings["documents"] + 1}
            if settings["masked"]:
                lengths["mask"] = settings["tokens"]
            dtypes = {"ids": np.dtype(settings["dtype"]), "offsets": np.dtype(np.int64), "mask": np.dtype(np.uint8)}
            parts = {
                part: CheckedArray(folder / f"{name}.{part}", dtypes[part], length, settings["crc32"][part])
                for part, length in lengths.items()
            }
            facts = settings["bytes"], settings["origin"], settings.get("counts", {})
            return cls(parts["ids"], parts["offsets"], parts.get("mask"), *facts)
        except FileNotFoundError:
            raise UserError(f"no tokens in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / name}.json is damaged: delete it and run ./prepare.sh again") from None


class ShardedIds:
    """Arrays, or the first `lengths` of each, read as one: `ids[a:b]` copies from as many of them as it spans."""

    def __init__(self, arrays: Sequence[Ids], lengths: Iterable[int] | None = None) -> None:
        self.arrays = arrays
        self._starts = list(accumulate(map(len, arrays) if lengths is None else lengths, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("only slices without a step are supported")
        pieces = []
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[index + 1])
            pieces.append(self.arrays[index][start - self._starts[index] : end - self._starts[index]])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, np.uint16)


@dataclass(frozen=True)
class TokenShards:
    """One split of a text: the token files of its shards as one stream."""

    ids: ShardedIds
    num_documents: int
    num_bytes: int  # raw bytes of the text, without special tokens
    counts: Counter[str] = field(default_factory=Counter)  # characters, and an estimate of letters by script

    @classmethod
    def open(cls, folder: Path, split: str, tokenizer: Tokenizer) -> "TokenShards":
        """Map a split. Raises UserError if it or a shard is missing, damaged or from another tokenizer."""
        index = index_file(folder, split)
        try:
            names = json.loads(index.read_text())["shards"]
        except FileNotFoundError:
            raise UserError(f"no tokens in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index} is damaged: run ./prepare.sh, which writes it again") from None
        files = [TokenFile.open(folder, name, tokenizer) for name in names]
        return cls(
            ShardedIds([file.ids for file in files]),
            sum(len(file) for file in files),
            sum(file.num_bytes for file in files),
            sum((Counter(file.counts) for file in files), Counter()),
        )

    @classmethod
    def join(cls, parts: Sequence["TokenShards"], counts: Sequence[int]) -> "TokenShards":
        """The first `counts` tokens of each part as one stream; more than a part has are several passes over it."""
        arrays, lengths = [], []
        for part, count in zip(parts, counts, strict=True):
            for array in cycle(part.ids.arrays):
                arrays.append(array)
                lengths.append(min(count, len(array)))
                if not (count := count - lengths[-1]):
                    break
        documents, num_bytes = (sum(getattr(part, name) for part in parts) for name in ("num_documents", "num_bytes"))
        return cls(ShardedIds(arrays, lengths), documents, num_bytes)


def index_file(folder: Path, split: str) -> Path:
    """The list of a split's shards, in order."""
    return folder / f"{split}.shards.json"
