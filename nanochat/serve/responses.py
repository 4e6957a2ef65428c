"""Response bodies of the OpenAI API, complete and streamed. Other APIs override the parts of ResponseBuilder.

Tool calls are not part of the text: they are in an additional field `nanochat`, which other clients ignore.
"""

import codecs
import itertools
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from nanochat.inference.detokenizer import Delta, TokenLogprob
from nanochat.serve.engine_process import RequestOutput
from nanochat.serve.errors import ApiError
from nanochat.serve.protocol import GenerationRequest
from nanochat.tokenizer import Tokenizer

Json = dict[str, Any]


def merge_deltas(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Merge consecutive deltas of the same type."""
    for part_type, grouped in itertools.groupby(deltas, lambda delta: delta.type):
        group = list(grouped)
        logprobs = [entry for delta in group for entry in delta.logprobs]
        yield Delta(part_type, "".join(delta.text for delta in group), logprobs)


def text_of(deltas: Iterable[Delta]) -> Delta:
    """Concatenate the text of a reply, without tool calls."""
    return next(merge_deltas(delta for delta in deltas if delta.type == "text"), Delta("text", ""))


class ResponseBuilder:
    """Builds the JSON objects of one response, which share an id and a creation time."""

    id_prefix: str  # with its separator
    object_type: str
    chunk_type: str
    final_choice: ClassVar[Json]  # streamed with the finish_reason

    can_repeat = False  # several replies to one prompt
    media_type = "text/event-stream"
    end = "data: [DONE]\n\n"  # of a stream

    def __init__(self, generation: GenerationRequest, tokenizer: Tokenizer, include_usage: bool = False) -> None:
        """include_usage: a stream ends with the usage."""
        self.generation = generation
        self.tokenizer = tokenizer
        self.include_usage = include_usage
        self._has_logprobs = generation.prompts[0][1].logprobs is not None
        self._hidden = set(tokenizer.special_ids.values())  # have a logprob, but no text
        own_id = f"{self.id_prefix}{secrets.token_hex(12)}"
        self._shared = {"id": own_id, "created": int(time.time()), "model": generation.card.id}

    def event(self, chunk: Json) -> str:
        """Format a chunk as an event of a stream."""
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def opening_chunks(self) -> Iterable[Json]:
        return ()

    def chunks(self, index: int, output: RequestOutput) -> Iterable[Json]:
        """Yield the chunks for one output of reply `index`."""
        for delta in merge_deltas(output.deltas):
            if choice := self.choice_delta(index, delta):
                yield self.chunk(index, choice)
        if output.finish_reason:
            yield self.chunk(index, self.final_choice, output.finish_reason)

    def chunk(self, index: int, choice: Json, finish_reason: str | None = None) -> Json:
        choices = [{"index": index, **choice, "finish_reason": finish_reason}]
        extra = {"usage": None} if self.include_usage else {}  # the last chunk has it
        return {**self._shared, "object": self.chunk_type, "choices": choices, **extra}

    def usage(self, num_tokens: int) -> Json:
        """Build the usage object. Tool output counts as completion tokens because it uses up context."""
        prompt_tokens = self.generation.num_prompt_tokens
        total = prompt_tokens + num_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}

    def closing_chunks(self, num_tokens: int) -> Iterable[Json]:
        """Yield the chunks that follow the last output of all replies."""
        if self.include_usage:
            yield {**self._shared, "object": self.chunk_type, "choices": [], "usage": self.usage(num_tokens)}

    def error_chunk(self, error: ApiError) -> Json:
        """Build the chunk that ends a stream whose generation failed."""
        return error.body

    def response(self, outputs: Sequence[list[RequestOutput]], num_tokens: int) -> Json:
        """Build the complete response from the outputs of each reply."""
        choices = []
        for index, own in enumerate(outputs):
            deltas = list(merge_deltas(delta for output in own for delta in output.deltas))
            choices.append({"index": index, **self.choice(deltas), "finish_reason": own[-1].finish_reason})
        return {**self._shared, "object": self.object_type, "choices": choices, "usage": self.usage(num_tokens)}

    def choice_delta(self, index: int, delta: Delta) -> Json | None:
        """Build a streamed choice; None: this delta is not sent."""
        raise NotImplementedError

    def choice(self, deltas: list[Delta]) -> Json:
        """Build a complete choice."""
        raise NotImplementedError


class ChatResponseBuilder(ResponseBuilder):
    """For /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object_type = "chat.completion"
    chunk_type = "chat.completion.chunk"
    can_repeat = True
    final_choice: ClassVar[Json] = {"delta": {}, "logprobs": None}

    def opening_chunks(self) -> Iterable[Json]:
        for index in range(len(self.generation.prompts)):
            yield self.chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def choice_delta(self, index: int, delta: Delta) -> Json | None:
        if not delta.text:
            return None
        if delta.type != "text":
            return {"delta": {"nanochat": {"type": delta.type, "text": delta.text}}, "logprobs": None}
        return {"delta": {"content": delta.text}, "logprobs": self._logprobs(delta.logprobs)}

    def choice(self, deltas: list[Delta]) -> Json:
        text = text_of(deltas)
        message: Json = {"role": "assistant", "content": text.text, "refusal": None}
        if any(delta.type != "text" for delta in deltas):
            message["nanochat"] = {"parts": [{"type": delta.type, "text": delta.text} for delta in deltas]}
        return {"message": message, "logprobs": self._logprobs(text.logprobs)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = [
            {**self._entry(own.token, own.logprob), "top_logprobs": [self._entry(*other) for other in own.top]}
            for own in logprobs
            if own.token not in self._hidden
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        raw = self.tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


class TextResponseBuilder(ResponseBuilder):
    """For /v1/completions."""

    id_prefix = "cmpl-"
    object_type = chunk_type = "text_completion"
    can_repeat = True
    final_choice: ClassVar[Json] = {"text": "", "logprobs": None}

    def __init__(self, generation: GenerationRequest, tokenizer: Tokenizer, include_usage: bool = False) -> None:
        super().__init__(generation, tokenizer, include_usage)
        self._num_characters = [0 for _ in generation.prompts]  # of each reply so far

    def choice_delta(self, index: int, delta: Delta) -> Json | None:
        if delta.type != "text":
            return None
        offset = self._num_characters[index]
        self._num_characters[index] += len(delta.text)
        return {"text": delta.text, "logprobs": self._logprobs(delta.logprobs, offset)}

    def choice(self, deltas: list[Delta]) -> Json:
        text = text_of(deltas)
        return {"text": text.text, "logprobs": self._logprobs(text.logprobs, 0)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> Json | None:
        """offset: of the first token in the reply's text, in characters."""
        if not self._has_logprobs:
            return None
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may have several tokens
        lengths = [
            len(utf8.decode(self.tokenizer.decode_bytes([own.token]))) if own.token not in self._hidden else 0
            for own in logprobs
        ]
        return {
            "tokens": [self._text(own.token) for own in logprobs],
            "token_logprobs": [own.logprob for own in logprobs],
            "top_logprobs": [self._alternatives(own) for own in logprobs],
            "text_offset": list(itertools.accumulate(lengths, initial=offset))[:-1],
        }

    def _alternatives(self, own: TokenLogprob) -> dict[str, float] | None:
        if own.logprob is None:
            return None
        return {self._text(token): logprob for token, logprob in [*own.top, (own.token, own.logprob)]}

    def _text(self, token: int) -> str:
        """Return a token's text; for a part of a character its bytes, in OpenAI's notation."""
        raw = self.tokenizer.decode_bytes([token])
        text = raw.decode("utf-8", "backslashreplace")
        return text if text.encode() == raw else f"bytes:{text}"
