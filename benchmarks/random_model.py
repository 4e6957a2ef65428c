"""A model with random weights for benchmarks whose figures do not depend on training."""

import torch

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime


def random_model(depth: int, vocab_size: int, sequence_len: int, runtime: Runtime, gain: float = 1.0) -> GPT:
    """Build a model whose matrices are all normal with a standard deviation of `gain` / sqrt(columns)."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(depth, vocab_size, sequence_len)
    with torch.device(runtime.device):
        model = GPT(config, runtime.compute_dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=gain * parameter.size(1) ** -0.5)
    return model
