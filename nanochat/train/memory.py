"""Estimate the memory that training needs, and how many rows of a batch fit at once."""

import math
from dataclasses import dataclass

import torch

from nanochat.model.cpu_kernels import saved_attention_weights
from nanochat.model.gpt import GPT
from nanochat.model.loss import workspace_bytes
from nanochat.runtime import cpu_rows, free_memory, has_unified_memory
from nanochat.train.checkpoint import checkpoint_bytes
from nanochat.train.optim import MuonAdamW
from nanochat.train.run import TrainingRun
from nanochat.units import format_gib

ACTIVATIONS_PER_LAYER = {"cpu": 15, "cuda": 18, "fp8": 12}
"""Numbers kept for the backward pass per layer, token and unit of width: outputs of two RMSNorms (2), query and key
after theirs (2), value and output of the attention (2), hidden units of the MLP before and after squaring (8). A GPU
also keeps the inputs of the RMSNorms (4), a CPU a second layout of the attention's output (1), unless it is blocked.
FP8, which is always compiled, keeps inputs of matrices in one byte."""
ACTIVATIONS_OUTSIDE_LAYERS = 6
"""The same outside the layers: embedding and last RMSNorm keep 2, and the backward pass of an MLP needs about 4."""
HEAP_GAPS = 0.9
"""On a CPU, an upper bound for the memory that malloc holds unused, relative to the short-lived tensors (measured with
the settings of scripts/env.sh)."""
SAFE_SHARE, SAFE_UNIFIED_SHARE = 0.9, 0.8
"""Fraction of the free memory to plan with. The rest allows for fragmentation, and on a GPU with the CPU's memory for
other programs: without it the machine freezes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bounds in bytes for training in one process."""

    weights: int  # fp32, plus a copy in the compute dtype if that differs
    gradients: int
    optimizer: int
    activations: int  # kept by the forward pass of `rows` rows
    logits: int  # one slice of logits in the loss, and the head's gradient before it is accumulated
    rows: int
    checkpoint: int  # the copy being written in the background, if it is in the same memory

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.checkpoint

    def describe(self) -> str:
        fixed = self.weights + self.gradients + self.optimizer
        copy = f", {format_gib(self.checkpoint)} for a checkpoint being written" if self.checkpoint else ""
        return (
            f"{format_gib(fixed)} for weights, gradients and optimizer, {format_gib(self.activations)} for the "
            f"activations of {self.rows} rows, {format_gib(self.logits)} for logits{copy}: {format_gib(self.total)}"
        )


def estimate_memory(model: GPT, optimizer: MuonAdamW, rows: int, *, shared: bool) -> MemoryEstimate:
    """Estimate training with `rows` rows per forward pass, eager unless in FP8; torch.compile needs less.

    `shared`: the device uses the CPU's memory, into which the main process also copies its checkpoints.
    """
    config, itemsize = model.config, model.compute_dtype.itemsize
    head = config.vocab_size * config.n_embd
    tokens = rows * config.sequence_len
    logits = workspace_bytes(tokens, config.vocab_size, model.compute_dtype, model.device)
    kind = "cpu" if model.device.type == "cpu" else "fp8" if model.trains_in_fp8 else "cuda"
    per_layer = ACTIVATIONS_PER_LAYER[kind] * config.n_embd
    attention = config.n_head * saved_attention_weights(config.sequence_len, model.device, model.compute_dtype)
    kept = (config.n_layer * (per_layer + attention) + ACTIVATIONS_OUTSIDE_LAYERS * config.n_embd) * tokens
    gaps = 1 + HEAP_GAPS if model.device.type == "cpu" else 1
    casts = (config.num_parameters - head) * itemsize if model.compute_dtype != torch.float32 else 0
    return MemoryEstimate(
        weights=4 * config.num_parameters + casts,
        gradients=4 * config.num_parameters,
        optimizer=sum(tensor.nbytes for tensor in optimizer.state_tensors),
        activations=round(gaps * kept * itemsize),
        logits=round(gaps * (logits + 2 * 4 * head)),
        rows=rows,
        checkpoint=checkpoint_bytes(config) if shared and optimizer.world.is_main else 0,
    )


def choose_device_batch_size(run: TrainingRun, max_rows: int) -> int:
    """Rows per forward pass: --device-batch-size, or for "auto" the largest power of two up to `max_rows` that fits.

    The main process prints the memory needed and available.
    """
    model, optimizer = run.model, run.optimizer
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *optimizer.state_tensors])
    available = held + free_memory(model.device)
    rows = run.options.device_batch_size
    if rows == "auto":
        rows = run.world.min(_largest_that_fits(model, optimizer, available, max_rows))
    assert rows is not None  # the stages have filled it in
    if run.world.is_main:
        print(explain(model, optimizer, rows, available))
    return rows


def explain(model: GPT, optimizer: MuonAdamW, rows: int, available: int) -> str:
    """Describe the memory needed and available, with a warning and advice if it does not fit."""
    shared = has_unified_memory(model.device)
    estimate = estimate_memory(model, optimizer, rows, shared=shared)
    text = f"memory: {estimate.describe()} of {format_gib(available)}"
    if estimate.total <= available:
        return text
    danger = "the system may kill it" if shared else "it may run out and continue with fewer rows"
    fits = fitting_rows(model, optimizer, available, rows)
    advice = f"--device-batch-size {fits} fits, with the same result" if fits else "only a smaller --depth fits"
    return f"{text}\nwarning: that does not fit, so {danger}; {advice}"


def fitting_rows(model: GPT, optimizer: MuonAdamW, available: int, max_rows: int) -> int:
    """The largest power of two up to `max_rows` whose estimate is within `available` bytes; 0 if there is none."""
    sizes = (1 << exponent for exponent in reversed(range(max_rows.bit_length())))
    shared = has_unified_memory(model.device)
    fits = (rows for rows in sizes if estimate_memory(model, optimizer, rows, shared=shared).total <= available)
    return next(fits, 0)


def _largest_that_fits(model: GPT, optimizer: MuonAdamW, available: int, max_rows: int) -> int:
    """The estimate, corrected by a trial on a GPU with its own memory.

    With unified memory, nothing stops a process that takes too much until the system kills it, or another process.
    """
    unified = has_unified_memory(model.device)
    safe = math.floor((SAFE_UNIFIED_SHARE if unified and model.device.type == "cuda" else SAFE_SHARE) * available)
    if model.device.type == "cpu":
        max_rows = min(max_rows, cpu_rows(model.config.sequence_len, model.compute_dtype))
    rows = max(1, fitting_rows(model, optimizer, safe, max_rows))
    if unified:
        return rows
    while rows > 1 and not _fits(model, rows, safe):
        rows //= 2
    while 2 * rows <= max_rows and _fits(model, 2 * rows, safe):
        rows *= 2
    return rows


def _fits(model: GPT, rows: int, available: int) -> bool:
    """Try two micro-batches: the second runs with the first one's gradients in memory."""
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.zeros(rows, model.config.sequence_len, dtype=torch.int64, device=model.device)
    try:
        for _ in range(2):
            model.loss(tokens, tokens).backward()
        return torch.cuda.max_memory_allocated() <= available
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
