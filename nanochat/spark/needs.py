"""Estimates the memory of a training process from the shape of its model."""

import torch

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.memory import needs
from nanochat.train.optim import MuonAdamW, OptimizerOptions


def training_bytes(config: GPTConfig, device_batch_size: int, *, shared: bool) -> int:
    """Maximum bytes of one process on a GPU, by nanochat.train.memory, without allocating the model.

    `shared`: True if the GPU uses the CPU's memory.
    """
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        return needs(model, MuonAdamW(model, OptimizerOptions()), device_batch_size, shared=shared).total
