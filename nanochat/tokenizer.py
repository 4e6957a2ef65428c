"""Byte-pair encoding and the chat format.

rustbpe trains the merges, tiktoken encodes with them. Text never becomes a special token: only the functions that
render a conversation add special tokens.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken

from nanochat.atomic import atomic_folder
from nanochat.conversations import Conversation, Message, Part, PartType, text_of
from nanochat.errors import UserError
from nanochat.untrusted import read_json, reading

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

SPLIT_PATTERN = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-4's pattern as llama.cpp, which only knows fixed patterns, spells it for Llama 3 (`llama-bpe`)."""

ORIGINAL_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's own spelling, as in karpathy/nanochat."""
SUPPORTED_PATTERNS = (SPLIT_PATTERN, ORIGINAL_PATTERN, ORIGINAL_PATTERN.replace(r"*[\r\n]|", r"*[\r\n]+|"))
"""The last one is the default of earlier commits."""
MAX_PIECE = 1 << 18
"""Characters encoded at once. tiktoken and rustbpe panic on a run of 999,999 spaces, where their regular expressions
exceed a limit."""

RANKS_FILE = "ranks.tiktoken"
SETTINGS_FILE = "tokenizer.json"
PART_MARKS: dict[PartType, tuple[str, str]] = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 for tokens that the assistant writes, which are trained on; else 0


class Tokenizer:
    """Converts text to token ids and back. Immutable."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN) -> None:
        """Raises ValueError if ids are missing or the pattern is unknown: others may drop text or take hours."""
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("the ids of its tokens must be the BPE ranks, from 0, with a token for each byte")
        if re.sub(r"\\p\{N\}(\{1,\d\})?\|", r"\\p{N}{1,3}|", pattern) not in SUPPORTED_PATTERNS:
            raise ValueError(f"its split pattern is not supported: {pattern[:100]!r}")
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special_ids["<|bos|>"]
        self.ranks = ranks  # id of each token's bytes; of all possible merges, the one with the lowest id is made first
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)  # the model pads it to a multiple of 64
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges. `vocab_size` includes special tokens and bytes; raises UserError if too small for them."""
        min_size = 256 + len(SPECIAL_TOKENS)
        if vocab_size < min_size:
            raise UserError(f"--vocab-size must be at least {min_size}, got {vocab_size}")
        trainer = rustbpe.Tokenizer()
        all_pieces = (piece for text in texts for piece in pieces(text))
        trainer.train_from_iterator(all_pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a folder that `save` wrote. Raises UserError if it is missing or damaged."""
        if not (folder / SETTINGS_FILE).exists():
            raise UserError(f"no tokenizer in {folder}: run ./prepare.sh first")
        fix = "the tokenizer is damaged, delete the folder and run ./prepare.sh again"
        with reading(folder / SETTINGS_FILE, fix):
            settings = read_json(folder / SETTINGS_FILE)
        with reading(folder / RANKS_FILE, fix):
            lines = [line.split() for line in (folder / RANKS_FILE).read_text().splitlines()]
            tokenizer = cls({base64.b64decode(token): int(rank) for token, rank in lines}, settings["pattern"])
            if tokenizer.hash != settings["hash"]:
                raise ValueError(f"does not match the checksum in {SETTINGS_FILE}")
            return tokenizer

    def save(self, folder: Path) -> Path | None:
        """Write ranks in tiktoken's text format, and settings as JSON.

        A different tokenizer in `folder`, which checkpoints may need, is renamed; returns its new folder, else None.
        """
        settings = {"pattern": self.pattern, "special_tokens": self.special_ids, "hash": self.hash}
        files = {RANKS_FILE: self._ranks_text, SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"}
        if all((folder / name).is_file() and (folder / name).read_text() == text for name, text in files.items()):
            return None
        old = None
        with atomic_folder(folder) as partial:
            for name, text in files.items():
                (partial / name).write_text(text)
            if folder.is_dir() and any(folder.iterdir()):
                old = folder.with_name(time.strftime(f"{folder.name}.%Y%m%d-%H%M%S"))
                folder.rename(old)
        return old

    @cached_property
    def _ranks_text(self) -> str:
        tokens = sorted(self.ranks, key=self.ranks.__getitem__)
        return "".join(f"{base64.b64encode(token).decode()} {self.ranks[token]}\n" for token in tokens)

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that determines the ids. Checkpoints and token files refer to it."""
        return hashlib.sha256("\0".join((self.pattern, *SPECIAL_TOKENS, self._ranks_text)).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of each token, (vocab_size,) int32; 0 for special tokens."""
        lengths = [len(token) for token in sorted(self.ranks, key=self.ranks.__getitem__)]
        return np.array([*lengths, *(0 for _ in SPECIAL_TOKENS)], dtype=np.int32)

    def special(self, name: str) -> int:
        return self.special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Names of special tokens are treated as plain text."""
        if len(text) <= MAX_PIECE:
            return self._encoding.encode_ordinary(text)
        return [token for piece in pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`; a special token decodes to its name."""
        return self._encoding.decode_bytes(list(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation: Conversation) -> Rendered:
        """Convert a conversation to ids and their mask.

        The mask covers what the assistant writes: text, tool calls and <|assistant_end|>, but neither
        <|assistant_start|> nor the output of tools.
        """
        ids, mask = [self.bos_id], [0]

        def add(tokens: list[int], learned: int) -> None:
            ids.extend(tokens)
            mask.extend([learned] * len(tokens))

        for message in fold_system_message(conversation["messages"]):
            role, content = message["role"], message["content"]
            add([self.special(f"<|{role}_start|>")], 0)
            parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                learned = int(role == "assistant" and part["type"] != "python_output")
                tokens = self.encode(part["text"])
                if part["type"] in PART_MARKS:
                    opening, closing = PART_MARKS[part["type"]]
                    tokens = [self.special(opening), *tokens, self.special(closing)]
                add(tokens, learned)
            add([self.special(f"<|{role}_end|>")], int(role == "assistant"))
        return Rendered(ids, mask)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the reply starts; a last message of the assistant is continued."""
        ids = self.render_conversation({"messages": list(messages)}).ids
        return ids[:-1] if messages[-1]["role"] == "assistant" else [*ids, self.special("<|assistant_start|>")]


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most MAX_PIECE characters, if possible where the split pattern does.

    That is before a space that follows anything but white space. Then the ids do not change.
    """
    start = 0
    while len(text) - start > MAX_PIECE:
        boundaries = re.finditer(r"(?<=\S) ", text[start : start + MAX_PIECE])
        end = start + max((match.start() for match in boundaries), default=MAX_PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def fold_system_message(messages: Sequence[Message]) -> list[Message]:
    """Prepend a system message to the user message that follows, if one does: the chat format has no system role."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    texts = [text_of(system)]
    if rest and rest[0]["role"] == "user":
        texts.append(text_of(rest.pop(0)))
    return [{"role": "user", "content": "\n\n".join(texts)}, *rest]
