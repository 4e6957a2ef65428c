"""Incremental detokenization: from the tokens of a reply to text, tool calls and their output."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat.conversations import Part, PartType
from nanochat.tokenizer import PART_MARKS, Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token under the model's own distribution: before temperature, top_k and so on."""

    token: int
    logprob: float | None  # None for a prompt's first token
    top: tuple[tuple[int, float], ...]  # the most likely tokens with their logprobs, best first


@dataclass(frozen=True)
class Delta:
    """The next piece of a reply."""

    type: PartType
    text: str
    logprobs: Sequence[TokenLogprob] = ()  # of the text's tokens, if requested


class Detokenizer:
    """Converts tokens to deltas as they arrive.

    Holds back incomplete UTF-8 sequences, and text that may turn out to be one of the `stop` strings. The text ends
    before the first stop string; then `stopped_by` is that string and no more deltas follow. Tool calls and their
    output are not searched for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), hidden: tuple[int, ...] = ()) -> None:
        """hidden: token ids that add no text, as special tokens."""
        self._tokenizer = tokenizer
        self._part_types = {tokenizer.special(opening): part_type for part_type, (opening, _) in PART_MARKS.items()}
        self._special_ids = {*tokenizer.special_ids.values(), *hidden}
        self._type: PartType = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""  # possible start of a stop string
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not been returned yet
        self.stopped_by: str | None = None

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> Delta | None:
        """Return the text that this token adds. Special tokens change the part's type and add only a logprob."""
        if self.stopped_by:
            return None
        if token in self._special_ids:
            rest = self.flush()
            self._type = self._part_types.get(token, "text")
            if logprob and (rest is None or rest.type == "text"):
                return Delta("text", rest.text if rest else "", [*(rest.logprobs if rest else ()), logprob])
            return rest
        if logprob:
            self._logprobs.append(logprob)
        return self._delta(self._before_stop(self._utf8.decode(self._tokenizer.decode_bytes([token]))))

    def flush(self) -> Delta | None:
        """Return the text held back: an incomplete character, or an incomplete stop string."""
        if self.stopped_by:
            return None
        text = self._before_stop(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        text, self._held = text + self._held, ""
        return self._delta(text)

    def _delta(self, text: str) -> Delta | None:
        if not text:
            return None
        logprobs, self._logprobs = self._logprobs, []
        return Delta(self._type, text, logprobs)

    def _before_stop(self, text: str) -> str:
        """Return the part of the held and new text that can be shown; hold the rest, or drop it after a stop string."""
        if not self._stop or self._type != "text":
            return text
        text = self._held + text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, self.stopped_by = min(found)
            self._held = ""
            return text[:end]
        lengths = (
            n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        end = len(text) - max(lengths, default=0)
        self._held = text[end:]
        return text[:end]


def add_delta(parts: list[Part], delta: Delta) -> None:
    """Append a delta to the parts of a reply, in place; extends the last part if it has the same type."""
    if parts and parts[-1]["type"] == delta.type:
        parts[-1]["text"] += delta.text
    else:
        parts.append({"type": delta.type, "text": delta.text})


def reply_parts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[Part]:
    """Convert the tokens of a complete reply to the parts of a message."""
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.feed(token) for token in tokens] + [detokenizer.flush()]
    parts: list[Part] = []
    for delta in filter(None, deltas):
        add_delta(parts, delta)
    return parts
