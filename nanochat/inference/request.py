"""What is asked of the engine, and what comes of it."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from nanochat.inference.detokenizer import Detokenizer
from nanochat.inference.sampling_params import SamplingParams, uniform

DRAWS_AT_ONCE = 64


class QueueFullError(Exception):
    """As many requests wait as may: try again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model's own distribution: before temperature, top_k and the like."""

    token: int
    logprob: float
    """natural logarithm of its probability"""
    top: tuple[tuple[int, float], ...]
    """the likeliest tokens with their logprobs, as many as were asked for, best first"""


@dataclass
class Completion:
    """What was written after a prompt."""

    tokens: list[int] = field(default_factory=list)
    """the closing <|assistant_end|> or <|bos|> included, and the stop string's"""
    sampled: list[bool] = field(default_factory=list)
    """False where the token was put there: a tool's output"""
    finish_reason: Literal["stop", "length"] | None = None
    """None while it is being written"""
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """one for each token if asked for, None where the token was put there; else empty"""


class Request:
    """A prompt, what has been written after it, and how much of both the model has read."""

    def __init__(
        self, prompt: Sequence[int], sampling: SamplingParams, context: int, decoder: Detokenizer | None
    ) -> None:
        """`context`: most tokens of prompt and completion. `decoder` looks for the stop strings, if there are any."""
        self.sampling = sampling
        self.decoder = decoder
        self.completion = Completion()
        self.prompt_length = len(prompt)
        self.limit = min(len(prompt) + sampling.max_tokens, context)
        """tokens of prompt and completion at which it ends"""
        self.tokens = list(prompt)
        """prompt and completion"""
        self.computed = 0
        """tokens whose keys and values are in the cache, or will be once the device has done what it was told"""
        self.in_flight = 0
        """1 if the device has drawn, or is about to draw, a token that the host does not know yet"""
        self.slot: int | None = None
        """its place in the cache; None before and after it is in the batch"""
        self.joined = 0.0
        """time.monotonic() when it joined the batch"""
        self.code: list[int] | None = None
        """what has been written since <|python_start|>"""
        self.tool_call: Future[str] | None = None
        """while it is set, nothing is written: the tool's output comes next"""
        self._draws: list[float] = []

    @property
    def is_ready(self) -> bool:
        """Whether the model can read on: not while a tool runs, nor when the last token that may come is in flight."""
        return self.tool_call is None and len(self.tokens) + self.in_flight < self.limit

    @property
    def uncomputed(self) -> int:
        """Tokens that the model has yet to read; it draws the next one when it has read them all."""
        return len(self.tokens) + self.in_flight - self.computed

    def next_draw(self) -> float:
        """The random number in [0, 1) that chooses the token in flight: a function of seed and place in the reply."""
        index = len(self.tokens) + self.in_flight - self.prompt_length
        if index % DRAWS_AT_ONCE == 0 or not self._draws:
            first = index - index % DRAWS_AT_ONCE
            self._draws = uniform([self.sampling.seed] * DRAWS_AT_ONCE, range(first, first + DRAWS_AT_ONCE)).tolist()
        return self._draws[index % DRAWS_AT_ONCE]
