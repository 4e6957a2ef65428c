"""How a request wants its tokens chosen, and the random numbers that choose them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.errors import UserError

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-4
"""temperatures below it always take the likeliest token: divided by smaller ones, logits leave the range of fp32"""


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens chosen."""

    max_tokens: int = 256
    """tokens after which a reply is cut"""
    temperature: float = 1.0
    """0, or next to it: always the likeliest token"""
    top_k: int | None = 50
    """only the k likeliest tokens are in the draw; None or 0: all"""
    seed: int = 0
    """same seed, same draws, whatever else is in the batch"""
    top_p: float = 1.0
    """only the likeliest tokens that together have this probability are in the draw"""
    min_p: float = 0.0
    """only tokens at least this many times as likely as the likeliest are in the draw"""
    repetition_penalty: float = 1.0
    """logits of tokens that prompt or reply hold already are divided by it where positive, else multiplied"""
    stop: tuple[str, ...] = ()
    """the reply ends before the first of these in its text"""
    logprobs: int | None = None
    """report the logprob of every token, and of so many of the likeliest; None: report nothing"""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} cannot be: the least is 1")
        if not 0 <= self.temperature < 100:
            raise UserError(f"temperature {self.temperature} cannot be: choose 0 to 2")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k {self.top_k} cannot be: choose a positive number, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} cannot be: choose more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} cannot be: choose 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty {self.repetition_penalty} cannot be: choose 1 to 2")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise UserError(f"stop cannot be {list(self.stop)}: choose at most {MAX_STOP_STRINGS} strings, none empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs {self.logprobs} cannot be: choose 0 to {MAX_LOGPROBS}")

    def sibling(self, index: int) -> "SamplingParams":
        """The sampling of the `index`-th of several replies to one prompt; 0 is this one itself."""
        if index == 0:
            return self
        seed = _mix(np.array([self.seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + np.uint64(index)
        return dataclasses.replace(self, seed=int(seed[0]))


CHAT_SAMPLING = SamplingParams(max_tokens=512, temperature=0.8, top_k=50)
"""How chat.sh and chat_cli.sh draw where nothing else is asked for, and a shared model elsewhere."""


def uniform(seeds: Sequence[int], indices: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each (seed, index), a hash of the two: no generator, so no state to keep or share.

    The mixing is SplitMix64's (Steele, Lea and Flood, 2014). Returns (N,) float64.
    """
    mixed = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64))
    return (_mix(mixed + np.array(indices, np.uint64)) >> np.uint64(11)) / float(1 << 53)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scatter neighbouring numbers over all of uint64."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
