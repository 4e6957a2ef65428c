"""Bits per byte against a plain computation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.data.batches import StreamRows
from nanochat.data.token_files import TokenFile
from nanochat.data.token_writer import write_documents
from nanochat.dist import World
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model

TEXTS = ["Hello, world! This is a text.", "naïve 東京 🚀", "A third one, somewhat longer than the others are."] * 3


def test_it_counts_raw_bytes_and_leaves_special_tokens_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path, "val", tokenizer, TEXTS, "x")
    rows = StreamRows(TokenFile.open(tmp_path, "val", tokenizer), 16, tokenizer.bos_id)
    model = random_model(tokenizer.vocab_size, sequence_len=16)
    nats = 0.0
    for tokens, targets in (rows[i] for i in range(len(rows))):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None])[0]
        for row, target in zip(logits, targets.tolist(), strict=True):
            if target not in (-1, tokenizer.bos_id):
                nats += F.cross_entropy(row[None], torch.tensor([target])).item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    runtime = Runtime(torch.device("cpu"), torch.float32, World())
    for batch_size in (1, 4):
        assert bits_per_byte(model, tokenizer, rows, batch_size, 10**6, runtime) == pytest.approx(expected, rel=1e-5)
