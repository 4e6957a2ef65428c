"""The token files of many shards as one stream, made by all cores.

Each shard has a token file of its own, so a run that was stopped goes on with the shards that are not there yet, and
only what a new tokenizer or new text makes stale is made again. `<split>.shards.json` says which of them, in which
order, make up a split.
"""

import json
import multiprocessing
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochat.data.progress import progress_bar
from nanochat.data.token_files import Ids, TokenFile, write_documents
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tokenizer import Tokenizer


class TextShard(Protocol):
    """A part of a text that is tokenised by one process. Pickled on its way there."""

    @property
    def name(self) -> str:
        """What its token file is called."""

    @property
    def origin(self) -> str:
        """What identifies exactly this text."""

    def texts(self) -> Iterator[str]:
        """Its documents."""


class ShardedIds:
    """Arrays end to end, read by slices: `ids[a:b]` copies from as many of them as it spans."""

    def __init__(self, arrays: Sequence[Ids]) -> None:
        self.arrays = arrays
        self._starts = list(accumulate((len(array) for array in arrays), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("only slices without a step can be read")
        pieces = []
        while start < stop:
            which = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[which + 1])
            pieces.append(self.arrays[which][start - self._starts[which] : end - self._starts[which]])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, np.uint16)


@dataclass(frozen=True)
class TokenShards:
    """One split: the token files of its shards, memory-mapped as one."""

    ids: ShardedIds
    num_documents: int
    num_bytes: int
    """raw bytes of the text, special tokens not counted"""

    @classmethod
    def open(cls, folder: Path, split: str, tokenizer: Tokenizer) -> "TokenShards":
        """Map a split. Raises UserError if it or a shard of it is missing, cut short, or made by another tokenizer."""
        try:
            names = json.loads(_index(folder, split).read_text())["shards"]
        except FileNotFoundError:
            raise UserError(f"there are no tokens in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{_index(folder, split)} is damaged: run ./prepare.sh, which makes it again") from None
        files = [TokenFile.open(folder, name, tokenizer) for name in names]
        return cls(
            ShardedIds([file.ids for file in files]),
            sum(len(file) for file in files),
            sum(file.num_bytes for file in files),
        )


def _index(folder: Path, split: str) -> Path:
    return folder / f"{split}.shards.json"


def write_shards(
    folder: Path, splits: Mapping[str, Sequence[TextShard]], tokenizer: Tokenizer, workers: int | None = None
) -> int:
    """Write the token files of all splits that are missing or stale; returns how many that were.

    One process for each core (or `workers` of them) takes a shard at a time: tiktoken encodes 12 MB a second on a core
    of a 2-core x86 machine, and threads would wait for each other. A second run waits for the first.
    Raises UserError if a process was killed or the disk is full; what is written by then is kept.
    """
    try:
        return _write_shards(folder, splits, tokenizer, workers)
    except BrokenProcessPool:
        raise UserError(
            "a process that made token files was killed, perhaps for want of memory: run ./prepare.sh again, it goes "
            "on with the shards that are left"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}): free some space and run ./prepare.sh again"
        ) from error


def _write_shards(
    folder: Path, splits: Mapping[str, Sequence[TextShard]], tokenizer: Tokenizer, workers: int | None
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        shards = [shard for part in splits.values() for shard in part]
        stale = [shard for shard in shards if not TokenFile.is_current(folder, shard.name, tokenizer, shard.origin)]
        workers = min(workers or os.cpu_count() or 1, len(stale))
        with progress_bar("tokenizing", len(stale)) as advance:
            for _ in _written(folder, stale, tokenizer, workers):
                advance(1)
        for split, part in splits.items():
            written = _index(folder, split).with_suffix(".partial")
            written.write_text(json.dumps({"shards": [shard.name for shard in part]}, indent=2) + "\n")
            written.replace(_index(folder, split))
    return len(stale)


def _written(folder: Path, shards: Sequence[TextShard], tokenizer: Tokenizer, workers: int) -> Iterator[None]:
    """Write shards, and say so each time that one is done."""
    if workers < 2:
        for shard in shards:
            write_documents(folder, shard.name, tokenizer, shard.texts(), shard.origin)
            yield
        return
    # Spawned, not forked: torch and the downloads have left threads behind.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_Worker.begin, initargs=(folder, tokenizer)) as pool:
        futures = [pool.submit(_Worker.write, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    """What a process keeps from shard to shard."""

    folder: Path
    tokenizer: Tokenizer

    @classmethod
    def begin(cls, folder: Path, tokenizer: Tokenizer) -> None:
        cls.folder, cls.tokenizer = folder, tokenizer

    @classmethod
    def write(cls, shard: TextShard) -> None:
        write_documents(cls.folder, shard.name, cls.tokenizer, shard.texts(), shard.origin)
