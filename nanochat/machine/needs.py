"""What a model takes: memory to train it, room for its checkpoints. Counted from its shape, in bytes."""

from nanochat.gpt import GPTConfig
from nanochat.loss import CHUNK_ELEMENTS

ACTIVATION_BYTES = 46
"""Kept for the backward pass for each token, layer and unit of width, in bfloat16 and uncompiled.

Counted with saved_tensors_hooks at depths 2, 4 and 6: 48, 46 and 46. What torch.compile recomputes instead of keeping
comes off, so this is the most that it takes.
"""
LOGIT_BUFFERS = 3
"""fp32 buffers of a slice of logits that the loss holds at a time (nanochat/loss.py)."""


def embedding_parameters(config: GPTConfig) -> int:
    """Parameters of embedding and head, which AdamW trains; Muon has the others."""
    return 2 * config.vocab_size * config.n_embd


def checkpoint_bytes(config: GPTConfig) -> int:
    """A checkpoint: weights, Muon's momentum, and AdamW's two moments of embedding and head, all in fp32."""
    return 4 * (2 * config.num_parameters + embedding_parameters(config))


def training_bytes(config: GPTConfig, device_batch_size: int) -> int:
    """Memory of one process on a GPU: weights, gradients, optimizer, bf16 copies of the weights, activations, logits.

    The most: compiled, it is less.
    """
    state = 4 * config.num_parameters + checkpoint_bytes(config)
    copies = 2 * config.num_parameters
    tokens = device_batch_size * config.sequence_len
    activations = ACTIVATION_BYTES * tokens * config.n_layer * config.n_embd
    logits = LOGIT_BUFFERS * 4 * min(CHUNK_ELEMENTS["cuda"], tokens * config.vocab_size)
    return state + copies + activations + logits
