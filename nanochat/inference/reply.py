"""From the tokens of a reply to what a person sees: text, tool calls and their output."""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from nanochat.data.conversations import Part, PartType
from nanochat.tokenizer import PART_MARKS, Tokenizer


@dataclass(frozen=True)
class Delta:
    """The next piece of a reply."""

    type: PartType
    text: str


class ReplyDecoder:
    """Turns tokens into deltas as they come; holds back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opening = {tokenizer.special(opening): kind for kind, (opening, _) in PART_MARKS.items()}
        self._special = set(tokenizer.special_ids.values())
        self._kind: PartType = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> Delta | None:
        """What this token adds; special tokens change the kind of part and are never shown."""
        if token not in self._special:
            text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
            return Delta(self._kind, text) if text else None
        rest = self.flush()
        self._kind = self._opening.get(token, "text")
        return rest

    def flush(self) -> Delta | None:
        """What is left at the end: a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return Delta(self._kind, text) if text else None


def add_delta(parts: list[Part], delta: Delta) -> None:
    """Add a piece to the parts of a reply, in place: it continues the last part where the type is the same."""
    if parts and parts[-1]["type"] == delta.type:
        parts[-1]["text"] += delta.text
    else:
        parts.append({"type": delta.type, "text": delta.text})


def reply_parts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[Part]:
    """A whole reply as the parts of a message, neighbours of one kind joined."""
    decoder = ReplyDecoder(tokenizer)
    deltas = [decoder.feed(token) for token in tokens] + [decoder.flush()]
    parts: list[Part] = []
    for delta in filter(None, deltas):
        add_delta(parts, delta)
    return parts
