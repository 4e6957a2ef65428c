"""What a model takes, counted from its shape, in bytes."""

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import needs
from nanochat.optim import MuonAdamW, OptimizerOptions


def checkpoint_bytes(config: GPTConfig) -> int:
    """A checkpoint: weights, Muon's momentum, and AdamW's two moments of embedding and head, all in fp32."""
    embeddings = 2 * config.vocab_size * config.n_embd
    return 4 * (2 * config.num_parameters + embeddings)


def training_bytes(config: GPTConfig, device_batch_size: int) -> int:
    """Memory of one process on a GPU, at most, as nanochat.memory reckons it for a model that is there."""
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        return needs(model, MuonAdamW(model, OptimizerOptions()), device_batch_size).total
