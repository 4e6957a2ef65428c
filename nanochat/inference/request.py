"""What is asked of the engine, and what comes of it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanochat.inference.sampling import Sampling


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
    """A prompt and what has been written after it."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt = list(prompt)
        self.sampling = sampling
        self.completion = Completion()
        self.forced: deque[int] = deque()
        """tokens that must come next, whatever the model says"""
        self.code: list[int] | None = None
        """what has been written since <|python_start|>"""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion.tokens)
