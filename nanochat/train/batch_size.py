"""How many rows go through the model at once. The result is the same.

On a GPU more of them run faster, until memory ends; on a CPU until its cache does."""

import torch

from nanochat.model.gpt import GPT
from nanochat.runtime import cpu_rows, has_unified_memory
from nanochat.train import memory
from nanochat.train.loop import Training
from nanochat.train.memory import gib
from nanochat.train.optim import MuonAdamW

SAFE_SHARE = 0.9
"""of the memory there is, to be planned with; the rest is for what cannot be reckoned, such as fragments"""


def choose(run: Training, most_rows: int) -> int:
    """Rows in one forward pass: the option, or if that is "auto" the largest power of two up to `most_rows` that fits.

    The main process says what memory the run will need and what there is.
    """
    room = memory.room(run.model, run.optimizer)
    rows = run.options.device_batch_size
    if rows == "auto":
        rows = run.runtime.world.min(_largest(run.model, run.optimizer, room, most_rows))
    assert rows is not None  # the stages have filled it in
    if run.runtime.world.is_main:
        print(explain(run.model, run.optimizer, rows, room))
    return rows


def explain(model: GPT, optimizer: MuonAdamW, rows: int, room: int) -> str:
    """What the run needs, what there is, and what to do if that is less."""
    shared = has_unified_memory(model.device)
    needs = memory.needs(model, optimizer, rows, shared=shared)
    text = f"memory: {needs.describe()} of {gib(room)} GiB"
    if needs.total <= room:
        return text
    danger = "the system may kill it" if shared else "it may run out and go on with fewer rows"
    fits = fitting(model, optimizer, room, rows)
    advice = f"--device-batch-size {fits} does, with the same result" if fits else "only a smaller --depth does"
    return f"{text}\nwarning: that does not fit, so {danger}; {advice}"


def fitting(model: GPT, optimizer: MuonAdamW, room: int, most_rows: int) -> int:
    """The largest power of two up to `most_rows` whose needs are within `room` bytes; 0 if there is none."""
    sizes = (1 << exponent for exponent in reversed(range(most_rows.bit_length())))
    shared = has_unified_memory(model.device)
    return next((rows for rows in sizes if memory.needs(model, optimizer, rows, shared=shared).total <= room), 0)


def _largest(model: GPT, optimizer: MuonAdamW, room: int, most_rows: int) -> int:
    """What fits by the estimate, then corrected by trying.

    Not tried where the GPU shares the CPU's memory, or there is no GPU: nothing there stops a process that takes too
    much until the system kills it, or another.
    """
    safe = int(SAFE_SHARE * room)
    if model.device.type == "cpu":
        most_rows = min(most_rows, cpu_rows(model.config.sequence_len, model.compute_dtype))
    rows = max(1, fitting(model, optimizer, safe, most_rows))
    if has_unified_memory(model.device):
        return rows
    while rows > 1 and not _fits(model, rows, safe):
        rows //= 2
    while 2 * rows <= most_rows and _fits(model, 2 * rows, safe):
        rows *= 2
    return rows


def _fits(model: GPT, rows: int, room: int) -> bool:
    """Whether two micro-batches of so many rows stay within `room` bytes, the second beside the first's gradients."""
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.zeros(rows, model.config.sequence_len, dtype=torch.int64, device=model.device)
    try:
        for _ in range(2):
            model.loss(tokens, tokens).backward()
        return torch.cuda.max_memory_allocated() <= room
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
