"""Byte-pair encoding and the chat format.

rustbpe trains the merges, tiktoken encodes with them. Text from people or files never becomes a special token: the
nine special tokens enter only through the functions that render a conversation.
"""

import base64
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken

from nanochat.conversations import Conversation, Message, Part, PartType
from nanochat.errors import UserError

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

# GPT-4's pattern with one change: numbers are split in groups of at most two digits, not three. At small
# vocabularies a token for each of a thousand numbers is a waste of merges.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

RANKS_FILE = "ranks.tiktoken"
SETTINGS_FILE = "tokenizer.json"
PART_MARKS: dict[PartType, tuple[str, str]] = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Rendered(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    mask: list[int]
    """1 where the assistant itself writes the token, and so learns it; else 0"""


class Tokenizer:
    """Text to token ids and back; immutable."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN) -> None:
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special_ids["<|bos|>"]
        self.ranks = ranks
        """each token's bytes and its id; the lower, the earlier two neighbours are joined to it"""
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges from `texts`; `vocab_size` counts the special tokens and the 256 bytes.

        Raises UserError if the vocabulary cannot be that small.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"--vocab-size {vocab_size} cannot be: the nearest that can is {smallest}")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if it is missing or damaged."""
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text())
            lines = (folder / RANKS_FILE).read_text().splitlines()
            tokenizer = cls(
                {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)},
                settings["pattern"],
            )
            intact = tokenizer.hash == settings["hash"]
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer in {folder}: run ./prepare.sh first") from None
        except (ValueError, KeyError):
            intact = False
        if not intact:
            raise UserError(f"the tokenizer in {folder} is damaged: delete that folder and run ./prepare.sh again")
        return tokenizer

    def save(self, folder: Path) -> Path | None:
        """Write tiktoken's text format and a small JSON, no pickle, into a folder that is there whole or not at all.

        Another tokenizer that is there, which checkpoints may need, is set aside as <folder>.<time>: returns where.
        """
        settings = {"pattern": self.pattern, "special_tokens": self.special_ids, "hash": self.hash}
        files = {RANKS_FILE: self._ranks_text, SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"}
        if all((folder / name).is_file() and (folder / name).read_text() == text for name, text in files.items()):
            return None
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text)
        aside = None
        if folder.is_dir() and any(folder.iterdir()):
            aside = folder.with_name(time.strftime(f"{folder.name}.%Y%m%d-%H%M%S"))
            folder.rename(aside)
        partial.rename(folder)
        return aside

    @property
    def vocab_size(self) -> int:
        """Ids that exist, special tokens included. The model pads this to a multiple of 64."""
        return self._encoding.n_vocab

    @cached_property
    def _ranks_text(self) -> str:
        ranks = sorted(self.ranks.items(), key=lambda item: item[1])
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides how text becomes ids; checkpoints and token files are tied to it."""
        return hashlib.sha256("\0".join((self.pattern, *SPECIAL_TOKENS, self._ranks_text)).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Raw bytes that each id stands for, (vocab_size,) int32; 0 for special tokens.

        Counted in bytes, never through str: a token may be half a character.
        """
        return np.array([*(len(token) for token, _ in sorted(self.ranks.items(), key=lambda item: item[1])),
                         *(0 for _ in SPECIAL_TOKENS)], dtype=np.int32)  # fmt: skip

    def special(self, name: str) -> int:
        """Id of a special token, such as <|user_start|>."""
        return self.special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; what looks like a special token is plain text."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Raw bytes of `ids`; a special token gives its name."""
        return self._encoding.decode_bytes(list(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
        """A whole conversation as ids with their mask, cut to `max_tokens`.

        The mask covers what the assistant writes, tool calls and <|assistant_end|> included; neither the marks
        that open its turn nor the tool's output, which are put there for it.
        """
        ids, mask = [self.bos_id], [0]

        def add(tokens: list[int], learned: int) -> None:
            ids.extend(tokens)
            mask.extend([learned] * len(tokens))

        for message in fold_system_message(conversation["messages"]):
            role = message["role"]
            add([self.special(f"<|{role}_start|>")], 0)
            for part in parts_of(message["content"]):
                learned = int(role == "assistant" and part["type"] != "python_output")
                tokens = self.encode(part["text"])
                if part["type"] in PART_MARKS:
                    opening, closing = PART_MARKS[part["type"]]
                    tokens = [self.special(opening), *tokens, self.special(closing)]
                add(tokens, learned)
            add([self.special(f"<|{role}_end|>")], int(role == "assistant"))
        return Rendered(ids[:max_tokens], mask[:max_tokens])

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with the user's turn, and <|assistant_start|> to answer it."""
        return [*self.render_conversation({"messages": list(messages)}).ids, self.special("<|assistant_start|>")]


def parts_of(content: str | list[Part]) -> list[Part]:
    """A message's content as parts, each {"type": "text" | "python" | "python_output", "text": ...}."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def fold_system_message(messages: Sequence[Message]) -> list[Message]:
    """Put a system message in front of the first user turn: the chat format has no role for it."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    text = "".join(part["text"] for part in parts_of(first["content"]))
    return [{"role": "user", "content": f"{system['content']}\n\n{text}"}, *rest]
