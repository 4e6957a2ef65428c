"""A request to the engine and its completion."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from nanochat.inference.detokenizer import Detokenizer, TokenLogprob
from nanochat.inference.sampling_params import SamplingParams, uniform

UNIFORM_BLOCK = 64
"""Random numbers computed at once: one numpy call per token would take longer than the numbers."""


@dataclass
class Completion:
    """Tokens generated after a prompt."""

    tokens: list[int] = field(default_factory=list)  # includes the closing <|assistant_end|> or <|bos|> and stop string
    sampled: list[bool] = field(default_factory=list)  # False for a tool's output
    finish_reason: Literal["stop", "length"] | None = None  # None while running
    logprobs: list[TokenLogprob | None] = field(default_factory=list)  # per token if requested, None for tool output


class Request:
    """A prompt, the tokens generated so far, and the state of both in the KV cache."""

    def __init__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_length: int, detokenizer: Detokenizer | None
    ) -> None:
        """max_length: prompt and completion together. detokenizer: searches for the stop strings, if there are any."""
        self.sampling = sampling
        self.detokenizer = detokenizer
        self.completion = Completion()
        self.prompt_length = len(prompt)
        self.max_length = min(len(prompt) + sampling.max_tokens, max_length)
        self.tokens = list(prompt)  # prompt and completion
        self.num_computed = 0  # tokens whose keys and values are in the cache, or are queued on the device
        self.num_in_flight = 0  # 1 if a token has been sampled on the device that the host has not read yet
        self.slot: int | None = None  # slot in the KV cache while running
        self.tool_code: list[int] | None = None  # tokens since <|python_start|>
        self.tool_call: Future[str] | None = None  # while set, nothing is sampled: the tool's output comes next
        self._uniforms: list[float] = []

    @property
    def is_ready(self) -> bool:
        """False while a tool runs, and when the last token allowed is in flight."""
        return self.tool_call is None and len(self.tokens) + self.num_in_flight < self.max_length

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has not read yet; the next token is sampled once this is 0."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    def next_uniform(self) -> float:
        """Return the random number in [0, 1) for the next token, a function of the seed and the token's index."""
        index = len(self.tokens) + self.num_in_flight - self.prompt_length
        if index % UNIFORM_BLOCK == 0 or not self._uniforms:
            start = index - index % UNIFORM_BLOCK
            seeds = [self.sampling.seed] * UNIFORM_BLOCK
            self._uniforms = uniform(seeds, range(start, start + UNIFORM_BLOCK)).tolist()
        return self._uniforms[index % UNIFORM_BLOCK]
