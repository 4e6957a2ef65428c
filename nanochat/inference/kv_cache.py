"""Keys and values of the sequences being written, and of those written before, one slot each."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.model.gpt import GPT
from nanochat.runtime import free_memory

SHARE_OF_FREE_MEMORY = 0.25


class KVCache:
    """`slots` sequences of at most a context, in the model's compute dtype.

    keys, values: (n_layer, slots, n_kv_head, context, head_dim). On a CPU the memory is taken as slots fill.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        config = model.config
        self.slots, self.length = slots, config.sequence_len
        shape = (config.n_layer, slots, config.n_kv_head, config.sequence_len, config.head_dim)
        self.keys, self.values = (_zeros(shape, model.compute_dtype, model.device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since attention multiplies what it masks by 0, which no NaN survives; numpy's take memory when written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def affordable_slots(model: GPT, wanted: int, budget_gb: float | None) -> int:
    """How many slots, at most `wanted`, fit in `budget_gb` gigabytes; by default in a quarter of the free memory.

    Raises UserError if the budget does not hold one context.
    """
    config = model.config
    values = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.sequence_len
    slot_bytes = values * model.compute_dtype.itemsize
    if budget_gb is None:
        return min(wanted, max(1, int(SHARE_OF_FREE_MEMORY * free_memory(model.device) / slot_bytes)))
    slots = min(wanted, int(budget_gb * 1e9 / slot_bytes))
    if slots < 1:
        raise UserError(f"--kv-cache-gb {budget_gb} cannot be: one context of this model takes {slot_bytes / 1e9:.3g}")
    return slots


@dataclass
class Slot:
    """What a slot holds, so that a prompt that begins alike need not be computed again."""

    index: int
    tokens: list[int] = field(default_factory=list)
    """the tokens whose keys and values are there, while no request uses the slot"""
    last_used: int = 0
    """when its last request left: a count that goes up"""
