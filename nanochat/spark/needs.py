"""What a model takes, counted from its shape, in bytes."""

import torch

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.memory import needs
from nanochat.train.optim import MuonAdamW, OptimizerOptions


def training_bytes(config: GPTConfig, device_batch_size: int, *, shared: bool) -> int:
    """Memory of one process on a GPU, at most, as nanochat.train.memory reckons it for a model that is there.

    `shared`: whether the GPU uses the CPU's memory.
    """
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        return needs(model, MuonAdamW(model, OptimizerOptions()), device_batch_size, shared=shared).total
