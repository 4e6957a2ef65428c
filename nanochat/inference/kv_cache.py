"""Keys and values of the sequences being written, one slot each."""

import torch
from torch import Tensor

from nanochat.gpt import GPT


class KVCache:
    """`slots` sequences of at most `length` tokens, in the model's dtype.

    The sequences in use are always slots 0 to n - 1, so that what a step reads is a view. Before a forward pass,
    `prefill` or `decode` says which slots and positions it fills; the model then calls `update` layer by layer.
    """

    def __init__(self, model: GPT, slots: int, length: int) -> None:
        config = model.config
        shape = (config.n_layer, slots, config.n_kv_head, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.device = model.device
        self.positions = torch.empty(0)
        """(B, T) of the forward pass under way"""
        self._slots = slice(0)
        self._mask = torch.empty(0)

    @property
    def length(self) -> int:
        """Tokens that a slot has room for."""
        return self.keys.size(3)

    def copy_from(self, smaller: "KVCache") -> None:
        """Take over all that another cache of as many slots holds."""
        self.keys[:, :, :, : smaller.length] = smaller.keys
        self.values[:, :, :, : smaller.length] = smaller.values

    def prefill(self, first_slot: int, sequences: int, length: int) -> None:
        """The next forward pass fills positions 0 to `length` - 1 of `sequences` slots from `first_slot` on.

        Shorter prompts are padded on the right: what the padding leaves behind is never looked at, as a sequence
        attends only to its own positions, and is overwritten as it grows.
        """
        self._slots = slice(first_slot, first_slot + sequences)
        self.positions = torch.arange(length, device=self.device).expand(sequences, length)
        self._mask = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()

    def decode(self, lengths: list[int]) -> None:
        """The next forward pass appends one token to slots 0 to len(lengths) - 1, which hold `lengths` tokens."""
        self._slots = slice(0, len(lengths))
        self.positions = torch.tensor(lengths, device=self.device).unsqueeze(1)
        self._mask = (torch.arange(max(lengths) + 1, device=self.device) <= self.positions)[:, None, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep key and value, (B, H_kv, T, D), and return all so far, (B, H_kv, L, D), with the mask."""
        keys, values = self.keys[layer, self._slots], self.values[layer, self._slots]
        if self._mask.dim() == 4:  # decode
            rows = torch.arange(key.size(0), device=self.device)
            at = self.positions[:, 0]
            keys[rows, :, at], values[rows, :, at] = key[:, :, 0], value[:, :, 0]
        else:
            keys[:, :, : key.size(2)], values[:, :, : key.size(2)] = key, value
        length = self._mask.size(-1)
        return keys[:, :, :length], values[:, :, :length], self._mask

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
