"""Sampling parameters of a request, and the random numbers used to sample its tokens."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.inference.json_constraint import JsonConstraint

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MASK = 2**64 - 1
GREEDY_BELOW = 1e-4  # dividing by smaller temperatures takes logits out of fp32's range, so these mean greedy decoding


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are sampled. Raises UserError if a value is out of range."""

    max_tokens: int = 256  # length at which the reply is cut; 0: only compute the prompt's logprobs
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = 50  # None or 0: all tokens
    seed: int = 0  # the same seed gives the same random numbers, whatever else is in the batch
    top_p: float = 1.0
    min_p: float = 0.0  # minimum probability relative to the most likely token's
    repetition_penalty: float = 1.0  # positive logits of tokens in prompt or reply are divided by it, others multiplied
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time that the reply contains it
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens that the reply contains
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added to their logits
    min_tokens: int = 0  # no earlier token ends the reply, but a stop string does
    stop_token_ids: tuple[int, ...] = ()  # the reply ends before the first of these tokens
    constraint: "Callable[[Tokenizer], JsonConstraint] | None" = None  # restricts which tokens may come next
    stop: tuple[str, ...] = ()  # the reply ends before the first of these strings
    logprobs: int | None = None  # also return the logprobs of each token and of this many alternatives
    echo_from: int | None = None  # the text starts with the prompt's, from this token on, with `logprobs` if set

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)}")

        check("max_tokens", self.max_tokens >= 0, "at least 0")
        check("temperature", 0 <= self.temperature < 100, "from 0 to 100")
        check("top_k", self.top_k is None or self.top_k >= 0, "positive, or 0 for all tokens")
        check("top_p", 0 <= self.top_p <= 1, "from 0 to 1")
        check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100")
        check(
            "stop",
            len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            f"{MAX_STOP_STRINGS} nonempty strings or fewer",
        )
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.echo_from is not None and self.logprobs is not None

    @cached_property
    def _seed_hash(self) -> int:
        return _mix(self.seed)

    def uniform(self, index: int) -> float:
        """Hash the seed and a token's index to a number in [0, 1). There is no generator, so no state to keep.

        The hash is SplitMix64 (Steele, Lea and Flood, 2014).
        """
        return (_mix(self._seed_hash + index) >> 11) / 2**53

    def child(self, index: int) -> "SamplingParams":
        """Derive the parameters of reply `index` when one prompt gets several; reply 0 uses these unchanged."""
        return dataclasses.replace(self, seed=(self._seed_hash + index) & MASK) if index else self


CHAT_SAMPLING = SamplingParams(max_tokens=512, temperature=0.8, top_k=50)
"""Defaults of chat.sh and chat_cli.sh, also written to generation_config.json of exported models."""


def _mix(x: int) -> int:
    x = ((x + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
