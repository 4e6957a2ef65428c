"""The KV cache: one slot per sequence."""

import math

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.model.gpt import GPT
from nanochat.runtime import free_memory

FREE_MEMORY_FRACTION = 0.25


class KVCache:
    """Keys and values of `slots` sequences of at most the model's context length, in its compute dtype.

    keys, values: (n_layer, slots, n_kv_head, length, head_dim). On a CPU, memory is allocated as slots fill.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        config = model.config
        self.slots, self.length = slots, config.sequence_len
        shape = (config.n_layer, slots, config.n_kv_head, config.sequence_len, config.head_dim)
        self.keys, self.values = (_zeros(shape, model.compute_dtype, model.device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros because attention multiplies masked values by 0, and 0 x NaN is NaN. numpy's zeros are allocated on write.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def num_slots(model: GPT, wanted: int, budget_gb: float | None) -> int:
    """Return how many slots fit in `budget_gb` (default: a quarter of the free memory), at most `wanted`.

    Raises UserError if the budget does not hold one sequence.
    """
    config = model.config
    elements = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.sequence_len
    slot_bytes = elements * model.compute_dtype.itemsize
    if budget_gb is None:
        return min(wanted, max(1, int(FREE_MEMORY_FRACTION * free_memory(model.device) / slot_bytes)))
    slots = min(wanted, int(budget_gb * 1e9 / slot_bytes))
    if slots < 1:
        raise UserError(f"--kv-cache-gb must be at least {slot_bytes / 1e9:.3g} (one sequence), got {budget_gb}")
    return slots
