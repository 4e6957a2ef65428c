"""What clients are sent, in OpenAI's shape: the JSON of replies, whole and in pieces of a stream.

Tool calls, which are not part of the text, travel in a field `nanochat` beside it, which other clients ignore.
"""

import itertools
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nanochat.conversations import Part
from nanochat.inference.detokenizer import Delta
from nanochat.inference.request import TokenLogprob
from nanochat.serve.engine_process import Piece
from nanochat.serve.protocol import said
from nanochat.tokenizer import Tokenizer

Json = dict[str, Any]


def event(data: Json | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def usage_of(prompt_tokens: int, completion_tokens: int) -> Json:
    """Tokens read and written; a tool's output counts as written, since it takes room in the context too."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Run(NamedTuple):
    """Text of one kind."""

    delta: Delta
    logprobs: list[TokenLogprob]
    """of its tokens"""


def runs(pieces: Iterable[Piece]) -> Iterator[Run]:
    """What the pieces add, neighbours of one kind joined."""
    added = (Run(*pair) for piece in pieces for pair in zip(piece.deltas, piece.logprobs, strict=True))
    for kind, group in itertools.groupby(added, lambda run: run.delta.type):
        members = list(group)
        text = "".join(run.delta.text for run in members)
        yield Run(Delta(kind, text), [entry for run in members for entry in run.logprobs])


class Writer(ABC):
    """Builds every JSON object of one answer, so that they share its id and its time."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, replies: int, with_usage: bool) -> None:
        """`with_usage`: each chunk has a field for it, null but in the last."""
        self.replies = replies
        self.tokenizer = tokenizer
        self.with_usage = with_usage
        self._shared = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterable[Json]:
        """The chunks before the text."""
        return ()

    def chunks(self, index: int, piece: Piece) -> Iterable[Json]:
        """The chunks that say what came of a step."""
        for run in runs([piece]):
            if choice := self.choice_delta(index, run):
                yield self.chunk(index, choice)
        if piece.finish_reason:
            yield self.chunk(index, self.choice_end(), piece.finish_reason)

    def chunk(self, index: int, choice: Json, finish_reason: str | None = None) -> Json:
        """One piece of a stream."""
        choices = [{"index": index, **choice, "finish_reason": finish_reason}]
        usage = {"usage": None} if self.with_usage else {}
        return {**self._shared, "object": self.chunk_object, "choices": choices, **usage}

    def usage_chunk(self, usage: Json) -> Json:
        """The piece that closes a stream whose client asked for usage."""
        return {**self._shared, "object": self.chunk_object, "choices": [], "usage": usage}

    def whole(self, pieces: Sequence[list[Piece]], usage: Json) -> Json:
        """The answer at once, from the pieces of each reply."""
        choices = []
        for index, of_reply in enumerate(pieces):
            choice = self.choice_whole(index, list(runs(of_reply)))
            choices.append({"index": index, **choice, "finish_reason": of_reply[-1].finish_reason})
        return {**self._shared, "object": self.whole_object, "choices": choices, "usage": usage}

    @abstractmethod
    def choice_delta(self, index: int, run: Run) -> Json | None:
        """What a chunk says of a piece of text or of a tool call; None: nothing."""

    @abstractmethod
    def choice_end(self) -> Json:
        """What the chunk with the finish_reason says besides."""

    @abstractmethod
    def choice_whole(self, index: int, reply: list[Run]) -> Json:
        """One of the choices of an answer that is not streamed."""

    def token_text(self, token: int) -> str:
        """A token as a string, which may be half a character."""
        return self.tokenizer.decode([token])


class ChatWriter(Writer):
    """For /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Iterable[Json]:
        for index in range(self.replies):
            yield self.chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def choice_delta(self, index: int, run: Run) -> Json:
        if run.delta.type != "text":
            return {"delta": {"nanochat": {"type": run.delta.type, "text": run.delta.text}}, "logprobs": None}
        return {"delta": {"content": run.delta.text}, "logprobs": self._logprobs(run.logprobs)}

    def choice_end(self) -> Json:
        return {"delta": {}, "logprobs": None}

    def choice_whole(self, index: int, reply: list[Run]) -> Json:
        parts: list[Part] = [{"type": run.delta.type, "text": run.delta.text} for run in reply]
        logprobs = [entry for run in reply if run.delta.type == "text" for entry in run.logprobs]
        message: Json = {"role": "assistant", "content": said(parts), "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["nanochat"] = {"parts": parts}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json | None:
        if not logprobs:
            return None
        content = [
            {**self._entry(own.token, own.logprob), "top_logprobs": [self._entry(*other) for other in own.top]}
            for own in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        raw = self.tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


class TextWriter(Writer):
    """For /v1/completions: text alone."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, replies: int, with_usage: bool, echo: Sequence[str]) -> None:
        """`echo`: the text before each reply."""
        super().__init__(model, tokenizer, replies, with_usage)
        self.echo = echo
        self._length = [len(text) for text in echo]
        """characters of each text so far"""

    def opening(self) -> Iterable[Json]:
        for index, text in enumerate(self.echo):
            if text:
                yield self.chunk(index, {"text": text, "logprobs": None})

    def choice_delta(self, index: int, run: Run) -> Json | None:
        if run.delta.type != "text":
            return None
        start = self._length[index]
        self._length[index] += len(run.delta.text)
        return {"text": run.delta.text, "logprobs": self._logprobs(run.logprobs, start)}

    def choice_end(self) -> Json:
        return {"text": "", "logprobs": None}

    def choice_whole(self, index: int, reply: list[Run]) -> Json:
        text, logprobs = self.echo[index], None
        for run in reply:
            if choice := self.choice_delta(index, run):
                text += choice["text"]
                own = choice["logprobs"]
                logprobs = {name: logprobs[name] + own[name] for name in own} if logprobs and own else logprobs or own
        return {"text": text, "logprobs": logprobs}

    def _logprobs(self, logprobs: list[TokenLogprob], start: int) -> Json | None:
        """`start`: characters before the first of these tokens."""
        if not logprobs:
            return None
        texts = [self.token_text(own.token) for own in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [own.logprob for own in logprobs],
            "top_logprobs": [{self.token_text(token): value for token, value in own.top} for own in logprobs],
            "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=start)),
        }
