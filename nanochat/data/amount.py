"""The amount of text that a model of some depth trains on."""

import math

from nanochat.model.gpt import GPTConfig

SHARD_CHARS = 250_000_000
CHARS_PER_TOKEN = 4.6  # English prose with a vocabulary of 32,768
TOKENS_PER_PARAMETER = 11.0  # of matrices and head, the best ratio at equal compute (docs/experiments.md)
SPARE = 1.1  # shards differ in length: 10% more than needed keeps a run within one epoch
MAX_EPOCHS = 4  # repeated up to four times, text is nearly as good as new: https://arxiv.org/abs/2305.16264


def tokens_for_depth(depth: int, vocab_size: int) -> float:
    """Number of tokens that a model of `depth` trains on by default."""
    return TOKENS_PER_PARAMETER * GPTConfig.from_depth(depth, vocab_size, 2048).num_multiplied


def shards_for_depth(depth: int, vocab_size: int) -> int:
    """Number of shards that a model of `depth` trains on in one epoch, plus validation."""
    return math.ceil(SPARE * tokens_for_depth(depth, vocab_size) * CHARS_PER_TOKEN / SHARD_CHARS / 8) * 8


def fit(num_tokens: float, depth: int, vocab_size: int) -> str | None:
    """A note if text of `num_tokens` is too little for a model of `depth`: the epochs, and the depth that fits."""
    epochs = tokens_for_depth(depth, vocab_size) / num_tokens
    if epochs <= MAX_EPOCHS:
        return None
    fitting = [d for d in range(1, depth) if tokens_for_depth(d, vocab_size) <= MAX_EPOCHS * num_tokens]
    advice = f"--depth {fitting[-1]} needs at most {MAX_EPOCHS}" if fitting else "add text, or continue a model"
    return f"depth {depth} trains on this text for {epochs:,.0f} epochs: {advice}"
