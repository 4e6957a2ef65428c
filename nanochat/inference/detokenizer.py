"""From the tokens of a reply to what a person sees: text, tool calls and their output."""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from nanochat.conversations import Part, PartType
from nanochat.tokenizer import PART_MARKS, Tokenizer


@dataclass(frozen=True)
class Delta:
    """The next piece of a reply."""

    type: PartType
    text: str


class Detokenizer:
    """Turns tokens into deltas as they come.

    Holds back bytes that are not yet a whole character, and text that may become one of the `stop` strings. The text
    ends before the first of these; then `stopped` is set and nothing more comes. What a tool is given or gives is not
    searched.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._opening = {tokenizer.special(opening): kind for kind, (opening, _) in PART_MARKS.items()}
        self._special = set(tokenizer.special_ids.values())
        self._kind: PartType = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""
        """the beginning of a stop string, perhaps"""
        self.stopped = False

    def feed(self, token: int) -> Delta | None:
        """What this token adds; special tokens change the kind of part and are never shown."""
        if self.stopped:
            return None
        if token not in self._special:
            return self._delta(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        rest = self.flush()
        self._kind = self._opening.get(token, "text")
        return rest

    def flush(self) -> Delta | None:
        """What is left at the end: a character that was never completed, or a stop string that was not."""
        if self.stopped:
            return None
        last = self._delta(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        text, self._held = (last.text if last else "") + self._held, ""
        return Delta(self._kind, text) if text else None

    def _delta(self, text: str) -> Delta | None:
        if self._stop and self._kind == "text":
            text = self._searched(self._held + text)
        return Delta(self._kind, text) if text else None

    def _searched(self, text: str) -> str:
        """What of `text` may be shown; the rest is held, or dropped after a stop string."""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        ends = (
            n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        held = max(ends, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def add_delta(parts: list[Part], delta: Delta) -> None:
    """Add a piece to the parts of a reply, in place: it continues the last part where the type is the same."""
    if parts and parts[-1]["type"] == delta.type:
        parts[-1]["text"] += delta.text
    else:
        parts.append({"type": delta.type, "text": delta.text})


def reply_parts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[Part]:
    """A whole reply as the parts of a message, neighbours of one kind joined."""
    decoder = Detokenizer(tokenizer)
    deltas = [decoder.feed(token) for token in tokens] + [decoder.flush()]
    parts: list[Part] = []
    for delta in filter(None, deltas):
        add_delta(parts, delta)
    return parts
