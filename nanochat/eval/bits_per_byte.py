"""Bits per byte of held-out text, comparable between tokenizers."""

import math
from collections.abc import Callable

import torch

from nanochat.data.batches import Rows, in_order
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, cpu_rows
from nanochat.tokenizer import Tokenizer


def bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    rows: Rows,
    device_batch_size: int,
    max_tokens: int,
    runtime: Runtime,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Cross-entropy in bits of the targets in the first `max_tokens` tokens, divided by their number of bytes.

    `rows` have the length of the context. Special tokens have no bytes: they are context, not scored. All processes
    share the rows and return the same number. `before_batch` is called equally often in every process, so it may
    synchronize them and may raise in all of them.
    """
    sequence_len = model.config.sequence_len
    if model.device.type == "cpu":
        device_batch_size = min(device_batch_size, cpu_rows(sequence_len, model.compute_dtype))
    token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=model.device)
    token_bytes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes).to(model.device)
    nats, total_bytes = 0.0, 0.0
    max_rows = max(1, max_tokens // sequence_len)
    common_rows = min(len(rows), max_rows) // runtime.world.size  # some processes have one more
    for i, batch in enumerate(in_order(rows, device_batch_size, runtime.world, max_rows)):
        if i * device_batch_size < common_rows:
            before_batch()
        tokens, targets = batch.tokens.to(model.device), batch.targets.to(model.device)
        losses = model.token_losses(tokens, targets)
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        nats += float((losses * (num_bytes > 0)).sum())
        total_bytes += int(num_bytes.sum())
    nats, total_bytes = runtime.world.sum(nats, total_bytes)
    return nats / math.log(2) / max(total_bytes, 1)
