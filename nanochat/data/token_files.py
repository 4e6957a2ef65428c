"""Token files: one file of token ids per text shard, memory-mapped, read as one stream.

    <split>.shards.json                      the shards of a split, in order
    <shard>.ids  .offsets  [.mask]  .json    token ids; where documents start; 1 if a token is trained on; settings

Each shard has its own file, so an interrupted run continues with the missing shards, and only files that new text or a
new tokenizer makes stale are rewritten. Blocks are verified against their checksums when they are first read: hashing
20 GB before the first step would take as long as reading it, and would miss later damage.
"""

import json
import unicodedata
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, chain, cycle, islice
from pathlib import Path

import numpy as np

from nanochat.atomic import atomic_write
from nanochat.conversations import Conversation
from nanochat.data.progress import in_processes
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tokenizer import Rendered, Tokenizer

BLOCK_BYTES = 1 << 16
"""Unit of checksums. Verifying one takes 18 us (CRC-32 at 3.6 GB/s on one x86 core), 5 ms per step at depth 20."""
DOCUMENTS_AT_ONCE = 256  # per numpy call when writing: one call per document took a sixth of the time


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

    @classmethod
    def is_current(cls, folder: Path, name: str, tokenizer: Tokenizer, origin: str) -> bool:
        """True if the file is complete, and from this tokenizer and the text identified by `origin`."""
        try:
            return cls.open(folder, name, tokenizer).origin == origin
        except UserError:
            return False


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
        try:
            names = json.loads(_index(folder, split).read_text())["shards"]
        except FileNotFoundError:
            raise UserError(f"no tokens in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{_index(folder, split)} is damaged: run ./prepare.sh, which writes it again") from None
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


def _index(folder: Path, split: str) -> Path:
    return folder / f"{split}.shards.json"


@dataclass(frozen=True)
class TextShard:
    """A part of a text that one process tokenizes. Pickled on its way there."""

    name: str  # of its token file
    origin: str  # identifies exactly this text
    texts: Callable[[], Iterable[str]]


def write_shards(
    folder: Path, splits: Mapping[str, Sequence[TextShard]], tokenizer: Tokenizer, workers: int | None = None
) -> int:
    """Write all missing or stale token files, with one process per core or `workers`; return how many were written.

    tiktoken encodes 12 MB/s per core on a 2-core x86 machine; threads would wait for each other. A second call waits
    for the first. Raises UserError if a process was killed, OSError if the disk is full; finished shards are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        shards = [shard for part in splits.values() for shard in part]
        stale = [shard for shard in shards if not TokenFile.is_current(folder, shard.name, tokenizer, shard.origin)]
        in_processes("tokenizing", partial(_write_shard, folder, tokenizer), stale, workers)
        for split, part in splits.items():
            with atomic_write(_index(folder, split)) as file:
                file.write(json.dumps({"shards": [shard.name for shard in part]}, indent=2) + "\n")
    return len(stale)


def _write_shard(folder: Path, tokenizer: Tokenizer, shard: TextShard) -> None:
    write_documents(folder, shard.name, tokenizer, shard.texts(), shard.origin)


def write_documents(folder: Path, name: str, tokenizer: Tokenizer, texts: Iterable[str], origin: str) -> None:
    """Write plain documents, each starting with <|bos|>. `origin` identifies the text."""
    counts: Counter[str] = Counter()

    def render(text: str) -> Rendered:
        counts["characters"] += len(text)
        step = min(len(text) // 8, 256) + 1
        for script, count in Counter(map(_script, filter(str.isalpha, text[::step]))).items():
            counts[script] += count * step
        return Rendered([tokenizer.bos_id, *tokenizer.encode(text)], [])

    _write(folder, name, tokenizer, map(render, texts), origin, masked=False, counts=counts)


@cache
def _script(letter: str) -> str:
    """The script of a letter, as in the names of Unicode characters: LATIN, CJK."""
    return unicodedata.name(letter, "OTHER").split(" ")[0]


def write_conversations(
    folder: Path, name: str, tokenizer: Tokenizer, conversations: Iterable[Conversation], origin: str
) -> None:
    """Write conversations with their loss mask."""
    rendered = (tokenizer.render_conversation(conversation) for conversation in conversations)
    _write(folder, name, tokenizer, rendered, origin, masked=True)


def _write(
    folder: Path, name: str, tokenizer: Tokenizer, documents: Iterable[Rendered], origin: str, masked: bool,
    counts: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    final = {part: folder / f"{name}.{part}" for part in ("ids", "offsets", "mask")}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, num_bytes = [0], 0
    with (
        atomic_write(final["ids"], "wb") as ids_file,
        atomic_write(final["mask"], "wb") as mask_file,
        atomic_write(final["offsets"], "wb") as offsets_file,
    ):
        remaining = iter(documents)
        while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
            ids = np.fromiter(chain.from_iterable(document.ids for document in batch), dtype)
            ids_file.write(ids.data)
            for document in batch:
                mask_file.write(bytes(document.mask))
                offsets.append(offsets[-1] + len(document.ids))
            num_bytes += int(tokenizer.token_bytes[ids].sum())
        offsets_file.write(np.array(offsets, np.int64).data)
        crc32 = {}
        for part, file in (("ids", ids_file), ("offsets", offsets_file), ("mask", mask_file)):
            file.flush()
            crc32[part] = checksums(Path(file.name))
        (folder / f"{name}.json").unlink(missing_ok=True)  # so that old settings never describe new ids
    settings = {
        "tokenizer": tokenizer.hash,
        "origin": origin,
        "dtype": dtype.name,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "bytes": num_bytes,
        "masked": masked,
        "counts": counts or {},
        "crc32": crc32,
    }
    with atomic_write(folder / f"{name}.json") as file:
        file.write(json.dumps(settings, indent=2) + "\n")
