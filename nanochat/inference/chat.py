"""A trained model to talk to: the newest checkpoint, an engine, and replies as they are written."""

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from nanochat import paths
from nanochat.conversations import Message
from nanochat.inference.detokenizer import Delta, Detokenizer
from nanochat.inference.engine import Engine
from nanochat.inference.request import Completion, Request
from nanochat.inference.sampling_params import SamplingParams
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint


@dataclass
class ChatModel:
    """A model, its tokenizer and its engine."""

    source: str
    """base, mid, sft or rl"""
    model_tag: str
    step: int
    engine: Engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was trained with."""
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """Most tokens of conversation and reply together."""
        return self.engine.model.config.sequence_len

    @property
    def description(self) -> str:
        """For a person: `sft d4 step 300`."""
        return f"{self.source} {self.model_tag} step {self.step}"

    def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, stop: threading.Event | None = None
    ) -> Generator[Delta, None, Completion]:
        """The reply to a conversation that ends with the user's turn, piece by piece.

        A base model, which knows no chat format, continues the last message as text. Ends at the reply's end, at
        max_tokens or the end of the context, or when `stop` is set. Returns, as a generator does, what was written,
        with its finish_reason. Raises UserError if the prompt does not fit.
        """
        request = self.engine.submit(self.prompt(messages), sampling)
        try:
            yield from self._deltas(request, stop)
            return request.completion
        finally:
            self.engine.cancel(request)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that `stream` gives the model."""
        return prompt_tokens(self.tokenizer, self.source, messages)

    def _deltas(self, request: Request, stop: threading.Event | None) -> Iterator[Delta]:
        decoder = Detokenizer(self.tokenizer, request.sampling.stop)
        seen = 0
        while not request.completion.finish_reason and not (stop and stop.is_set()):
            self.engine.step()
            for token in request.completion.tokens[seen:]:
                delta = decoder.feed(token)
                if delta:
                    yield delta
            seen = len(request.completion.tokens)
        rest = decoder.flush()
        if rest:
            yield rest


def prompt_tokens(tokenizer: Tokenizer, source: str, messages: Sequence[Message]) -> list[int]:
    """A conversation as a model of the stage `source` reads it; a base model, only the last message as text."""
    if source == "base":
        return [tokenizer.bos_id, *tokenizer.encode(str(messages[-1]["content"]))]
    return tokenizer.render_prompt(messages)


def load_chat(
    source: str | None = None,
    model_tag: str | None = None,
    step: int | None = None,
    device_type: str = "auto",
    max_batch_size: int = 16,
    max_waiting: int | None = None,
    kv_cache_gb: float | None = None,
    half_weights: bool = False,
) -> ChatModel:
    """The model to talk to; without a source, the most advanced there is: rl > sft > mid > base.

    max_batch_size, max_waiting, kv_cache_gb, half_weights: as Engine takes them.
    Raises UserError if there is none, or if its tokenizer is not the one at hand.
    """
    found = checkpoint.find(source, model_tag, step)
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    runtime = Runtime.start(device_type)
    model = found.load_model(runtime.device, runtime.compute_dtype, tokenizer).eval()
    model.to(runtime.compute_dtype)  # nothing is trained here: half the memory, and no cast at every token
    engine = Engine(model, tokenizer, Calculator(), max_batch_size, max_waiting, kv_cache_gb, half_weights)
    return ChatModel(found.source, found.tag, found.step, engine)
