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
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch in in_order(rows, device_batch_size, runtime.share, most_rows=max(1, most_tokens // rows.sequence_len)):
        tokens, targets, _ = batch.to(model.device)
        losses = model.token_losses(tokens, targets)
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        sums += torch.stack(((losses * (num_bytes > 0)).sum(dtype=torch.float64), num_bytes.sum(dtype=torch.float64)))
    nats, total_bytes = runtime.sum(sums).tolist()
    return nats / math.log(2) / total_bytes
