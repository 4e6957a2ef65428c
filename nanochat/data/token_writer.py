"""Tokenize text and conversations into token files.

Each shard has its own file, so an interrupted run continues with the missing shards, and only files that new text or a
new tokenizer makes stale are rewritten.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from nanochat.atomic import atomic_write
from nanochat.conversations import Conversation
from nanochat.data.progress import in_processes
from nanochat.data.token_files import TokenFile, checksums, index_file
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tokenizer import Rendered, Tokenizer

SUFFIXES = (".ids", ".offsets", ".mask", ".json")  # of the files of a shard
DOCUMENTS_AT_ONCE = 256  # per numpy call: one call per document took a sixth of the time


@dataclass(frozen=True)
class TextShard:
    """A part of a text that one process tokenizes. Pickled on its way there."""

    name: str  # of its token file
    origin: str  # identifies exactly this text
    texts: Callable[[], Iterable[str]]


def write_shards(
    folder: Path,
    splits: Mapping[str, Sequence[TextShard]],
    tokenizer: Tokenizer,
    workers: int | None = None,
    *,
    remove_others: bool = False,
) -> int:
    """Write all missing or stale token files, with one process per core or `workers`; return how many were written.

    tiktoken encodes 12 MB/s per core on a 2-core x86 machine; threads would wait for each other. A second call waits
    for the first. `remove_others`: delete the token files of other shards. Raises UserError if a process was killed,
    OSError if the disk is full; finished shards are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        shards = [shard for part in splits.values() for shard in part]
        stale = [shard for shard in shards if not is_current(folder, shard.name, tokenizer, shard.origin)]
        in_processes("tokenizing", partial(_write_shard, folder, tokenizer), stale, workers)
        for split, part in splits.items():
            with atomic_write(index_file(folder, split)) as file:
                file.write(json.dumps({"shards": [shard.name for shard in part]}, indent=2) + "\n")
        kept = {shard.name for shard in shards} | {index_file(folder, split).stem for split in splits}
        for path in folder.glob("*.*.*") if remove_others else ():  # small-07.train.ids
            if path.suffix in SUFFIXES and path.stem not in kept:
                path.unlink()
    return len(stale)


def is_current(folder: Path, name: str, tokenizer: Tokenizer, origin: str) -> bool:
    """True if the token file is complete, and from this tokenizer and the text identified by `origin`."""
    try:
        return TokenFile.open(folder, name, tokenizer).origin == origin
    except UserError:
        return False


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
