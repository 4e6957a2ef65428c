"""What memory a run needs, what there is, and whether an error means that it ran out."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat.errors import UserError
from nanochat.model.cpu_kernels import saved_attention_weights
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.loss import workspace_bytes
from nanochat.runtime import free_memory
from nanochat.train.optim import MuonAdamW

ACTIVATIONS_PER_LAYER = {"cpu": 15, "cuda": 18}
"""Numbers that one layer keeps for the backward pass, for each token and each unit of width: what comes out of two
RMSNorms (2), query and key after theirs (2), value and output of the attention (2), the MLP's hidden units before and
after squaring (8). A GPU also keeps what goes into the RMSNorms (4), a CPU the attention's output in two layouts (1),
where that is not in blocks."""
ACTIVATIONS_BESIDES = 6
"""The same, of no layer: embedding and last RMSNorm keep 2, and the backward pass of an MLP works in about 4."""
HEAP_GAPS = 0.9
"""On a CPU, what malloc keeps unused between tensors that come and go, as a share of them, at most (measured with the
settings of scripts/env.sh)."""


class ExhaustedError(Exception):
    """A process of the run had too little memory for its batch."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn CUDA's running out of memory into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory ran out: run again with half the --device-batch-size; it resumes from the last checkpoint"
        ) from None


@dataclass(frozen=True)
class Needs:
    """What training takes at most, in bytes, in one process."""

    weights: int
    """in fp32, and once more in the compute dtype where that is another"""
    gradients: int
    optimizer: int
    activations: int
    """kept by the forward pass of `rows` rows"""
    logits: int
    """the loss's slice of logits, and the head's gradient until it is added to the others"""
    rows: int
    checkpoint: int
    """the copy that is written while training goes on, where it lies in the memory that is counted here"""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.checkpoint

    def describe(self) -> str:
        """For a person, in GiB."""
        fixed = self.weights + self.gradients + self.optimizer
        copy = f", {gib(self.checkpoint)} for a checkpoint on its way to the disk" if self.checkpoint else ""
        return (
            f"{gib(fixed)} for weights, gradients and optimizer, {gib(self.activations)} for the activations of "
            f"{self.rows} rows, {gib(self.logits)} for logits{copy}: {gib(self.total)} GiB"
        )


def checkpoint_bytes(config: GPTConfig) -> int:
    """A checkpoint: weights, Muon's momentum, and AdamW's two moments of embedding and head, all in fp32."""
    embeddings = 2 * config.vocab_size * config.n_embd
    return 4 * (2 * config.num_parameters + embeddings)


def needs(model: GPT, optimizer: MuonAdamW, rows: int, *, shared: bool) -> Needs:
    """What a step with `rows` rows in a forward pass takes, not compiled and not in FP8; with either it is less.

    `shared`: whether the device uses the CPU's memory, where the main process copies what it saves. A model of a
    shape only cannot tell.
    """
    config, itemsize = model.config, model.compute_dtype.itemsize
    head = config.vocab_size * config.n_embd
    tokens = rows * config.sequence_len
    logits = workspace_bytes(tokens, config.vocab_size, model.compute_dtype, model.device)
    per_layer = ACTIVATIONS_PER_LAYER["cpu" if model.device.type == "cpu" else "cuda"]
    in_attention = config.n_head * saved_attention_weights(config.sequence_len, model.device, model.compute_dtype)
    kept = (config.n_layer * (per_layer * config.n_embd + in_attention) + ACTIVATIONS_BESIDES * config.n_embd) * tokens
    gaps = 1 + HEAP_GAPS if model.device.type == "cpu" else 1
    casts = (config.num_parameters - head) * itemsize if model.compute_dtype != torch.float32 else 0
    return Needs(
        weights=4 * config.num_parameters + casts,
        gradients=4 * config.num_parameters,
        optimizer=sum(tensor.nbytes for tensor in optimizer.state.values()),
        activations=round(gaps * kept * itemsize),
        logits=round(gaps * (logits + 2 * 4 * head)),
        rows=rows,
        checkpoint=checkpoint_bytes(config) if shared and optimizer.world.rank == 0 else 0,
    )


def room(model: GPT, optimizer: MuonAdamW) -> int:
    """Bytes that there are for one process: what is free, and what weights and optimizer have taken already."""
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *optimizer.state.values()])
    return held + free_memory(model.device)


def gib(count: int) -> str:
    """Bytes in GiB, with two digits that count."""
    return f"{count / 2**30:.1f}" if count >= 2**30 else f"{count / 2**30:.2g}"
