"""Token ids on disk: written once, memory-mapped ever after, tied to the tokenizer that made them.

A folder holds for each split `<split>.ids` (the ids of all documents end to end, each opening with bos),
`<split>.mask` where some tokens are not learned, `<split>.offsets` (where documents begin) and `<split>.json`, with the
checksums of the others. They take their names when they are whole, the last one last: a split without it does not
exist. Nothing is written in place, so a run that has mapped a split goes on with the one it opened.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from nanochat.conversations import Conversation
from nanochat.data.checked_array import CheckedArray, checksums
from nanochat.errors import UserError
from nanochat.tokenizer import Rendered, Tokenizer

DOCUMENTS_AT_ONCE = 256

Ids = np.ndarray | CheckedArray
"""What can be read by slices."""


@dataclass(frozen=True)
class TokenFile:
    """One split, memory-mapped."""

    ids: Ids
    """(N,) uint16 or uint32"""
    offsets: Ids
    """(documents + 1,) int64: document i is ids[offsets[i] : offsets[i + 1]]"""
    mask: Ids | None
    """(N,) uint8, 1 where the token is learned; None where all are"""
    num_bytes: int
    """raw bytes of the text, special tokens not counted"""

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @classmethod
    def open(cls, folder: Path, split: str, tokenizer: Tokenizer) -> "TokenFile":
        """Map a split. Raises UserError if it is missing, damaged, or another tokenizer made it.

        What is damaged inside is noticed when it is read.
        """
        try:
            settings = json.loads((folder / f"{split}.json").read_text())
            if settings["tokenizer"] != tokenizer.hash:
                raise UserError(f"the tokens in {folder} were made by another tokenizer: run ./prepare.sh again")
            lengths = {"ids": settings["tokens"], "offsets": settings["documents"] + 1}
            if settings["masked"]:
                lengths["mask"] = settings["tokens"]
            dtypes = {"ids": np.dtype(settings["dtype"]), "offsets": np.dtype(np.int64), "mask": np.dtype(np.uint8)}
            parts = {
                part: CheckedArray(folder / f"{split}.{part}", dtypes[part], length, settings["crc32"][part])
                for part, length in lengths.items()
            }
            return cls(parts["ids"], parts["offsets"], parts.get("mask"), settings["bytes"])
        except FileNotFoundError:
            raise UserError(f"there are no tokens in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / split}.json is damaged: delete it and run ./prepare.sh again") from None

    @classmethod
    def is_current(cls, folder: Path, split: str, tokenizer: Tokenizer, origin: str) -> bool:
        """Whether the split is there and whole, made by this tokenizer from text that calls itself `origin`."""
        try:
            settings = json.loads((folder / f"{split}.json").read_text())
            cls.open(folder, split, tokenizer)
        except (FileNotFoundError, ValueError, UserError):
            return False
        return bool(settings.get("origin") == origin)


def write_documents(folder: Path, split: str, tokenizer: Tokenizer, texts: Iterable[str], origin: str) -> None:
    """Write plain documents, on one core. `origin` names the text, so that other text is noticed later."""
    rendered = (Rendered([tokenizer.bos_id, *tokenizer.encode(text)], []) for text in texts)
    _write(folder, split, tokenizer, rendered, origin, masked=False)


def write_conversations(
    folder: Path, split: str, tokenizer: Tokenizer, conversations: Iterable[Conversation], max_tokens: int, origin: str
) -> None:
    """Write conversations with their loss mask, each cut to `max_tokens`."""
    rendered = (tokenizer.render_conversation(conversation, max_tokens) for conversation in conversations)
    _write(folder, split, tokenizer, rendered, origin, masked=True)


def _write(
    folder: Path, split: str, tokenizer: Tokenizer, documents: Iterable[Rendered], origin: str, masked: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    final = {suffix: folder / f"{split}.{suffix}" for suffix in ("ids", "mask", "offsets", "json")}
    partial = {suffix: path.with_name(f"{path.name}.partial") for suffix, path in final.items()}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, num_bytes = [0], 0
    with partial["ids"].open("wb") as ids_file, partial["mask"].open("wb") as mask_file:
        remaining = iter(documents)
        # Some documents at a time: a few numpy calls for each of them are a sixth of the time.
        while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
            ids = np.fromiter(chain.from_iterable(document.ids for document in batch), dtype)
            ids_file.write(ids.data)
            for document in batch:
                mask_file.write(bytes(document.mask))
                offsets.append(offsets[-1] + len(document.ids))
            num_bytes += int(tokenizer.token_bytes[ids].sum())
    np.array(offsets, np.int64).tofile(partial["offsets"])
    settings = {
        "tokenizer": tokenizer.hash,
        "origin": origin,
        "dtype": dtype.name,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "bytes": num_bytes,
        "masked": masked,
        "crc32": {part: checksums(partial[part]) for part in ("ids", "offsets", "mask")},
    }
    partial["json"].write_text(json.dumps(settings, indent=2) + "\n")
    final["json"].unlink(missing_ok=True)  # from here to the end there is no split: never old settings over new ids
    for suffix, path in partial.items():
        os.replace(path, final[suffix])
