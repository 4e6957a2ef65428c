"""Bits per byte: how well a model compresses held-out text, whatever its tokenizer."""

import math

import torch

from nanochat.data.batches import in_order
from nanochat.data.packing import StreamRows
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer


def bits_per_byte(
    model: GPT, tokenizer: Tokenizer, rows: StreamRows, device_batch_size: int, most_tokens: int, runtime: Runtime
) -> float:
    """Cross-entropy of the first `most_tokens` tokens in bits, over their raw bytes.

    Special tokens stand for no bytes, so they are given and not scored. All processes share the rows and get the
    same answer.
    """
    token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=model.device)
    token_bytes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes).to(model.device)
    nats, total_bytes = 0.0, 0.0
    for batch in in_order(rows, device_batch_size, runtime.share, most_rows=max(1, most_tokens // rows.sequence_len)):
        tokens, targets, _ = batch.to(model.device)
        losses = model.token_losses(tokens, targets)
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        nats += float((losses * (num_bytes > 0)).sum())
        total_bytes += int(num_bytes.sum())
    nats, total_bytes = runtime.sum_numbers(nats, total_bytes)
    return nats / math.log(2) / total_bytes
