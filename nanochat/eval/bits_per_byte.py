"""Bits per byte: how well a model compresses held-out text, whatever its tokenizer."""

import math
from collections.abc import Callable

import torch

from nanochat.data.batches import in_order
from nanochat.data.packing import StreamRows
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, cpu_rows
from nanochat.tokenizer import Tokenizer


def bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    rows: StreamRows,
    device_batch_size: int,
    most_tokens: int,
    runtime: Runtime,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Cross-entropy of the first `most_tokens` tokens in bits, over their raw bytes.

    Special tokens stand for no bytes, so they are given and not scored. All processes share the rows and get the
    same answer.

    `before_batch` is called before each batch that every process has, so equally often in each of them: they may meet
    in it, and leave by what it raises in all.
    """
    if model.device.type == "cpu":
        device_batch_size = min(device_batch_size, cpu_rows(rows.sequence_len, model.compute_dtype))
    token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=model.device)
    token_bytes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes).to(model.device)
    nats, total_bytes = 0.0, 0.0
    most_rows = max(1, most_tokens // rows.sequence_len)
    in_all = min(len(rows), most_rows) // runtime.world.size  # some processes have one row more
    for i, batch in enumerate(in_order(rows, device_batch_size, runtime.world, most_rows)):
        if i * device_batch_size < in_all:
            before_batch()
        tokens, targets = batch.tokens.to(model.device), batch.targets.to(model.device)
        losses = model.token_losses(tokens, targets)
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        nats += float((losses * (num_bytes > 0)).sum())
        total_bytes += int(num_bytes.sum())
    nats, total_bytes = runtime.world.sum(nats, total_bytes)
    return nats / math.log(2) / total_bytes
