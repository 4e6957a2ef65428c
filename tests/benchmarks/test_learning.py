"""The comparison of recipes is fair, and its figures are right."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.learning import RECIPE_2025, BenchmarkOptions, Point, Recipe, Text, Training, mean_curve, table
from nanochat.data.batches import StreamRows
from nanochat.data.token_files import ShardedIds, TokenShards
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

OPTIONS = BenchmarkOptions(
    depth=1, max_seq_len=32, tokens=1024, eval_tokens=256, device_batch_size=4, device_type="cpu"
)


@pytest.fixture
def text(tokenizer: Tokenizer) -> Text:
    ids = np.array(tokenizer.encode("one two three four five six seven " * 200), np.uint16)
    rows = StreamRows(TokenShards(ShardedIds([ids]), 1, 0), OPTIONS.max_seq_len, tokenizer.bos_id)
    return Text(tokenizer, rows, rows)


def test_recipes_start_from_the_same_weights_and_read_the_same_rows(text: Text) -> None:
    recipe = Recipe(total_batch_size=64, short_rows_ratio=0.0)
    with Runtime.start("cpu") as runtime:
        one, other = (
            Training(OPTIONS, each, text, 3, runtime)
            for each in (recipe, replace(recipe, total_batch_size=256, warmdown_ratio=1.0))
        )
        for name, weight in one.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])
        rows = [
            [row for step in range(training.num_iterations) for batch in training.batches.step_data(step).batches
             for row in batch.tokens.tolist()]
            for training in (one, other)
        ]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) == OPTIONS.tokens // OPTIONS.max_seq_len


def test_training_lowers_the_loss_and_counts_tokens_and_seconds(text: Text) -> None:
    with Runtime.start("cpu") as runtime:
        training = Training(OPTIONS, replace(RECIPE_2025, total_batch_size=64), text, 0, runtime)
        points = []
        for step in (0, 8, 16):
            training.train(step)
            points.append(training.evaluate(OPTIONS.eval_tokens))
    start, middle, end = points
    assert (start.tokens, middle.tokens, end.tokens) == (0, 512, 1024)
    assert start.seconds < middle.seconds < end.seconds
    assert start.bits_per_byte > middle.bits_per_byte > end.bits_per_byte


def test_fp8_only_changes_the_arithmetic(text: Text) -> None:
    recipe = Recipe(total_batch_size=64)
    with Runtime.start("cpu") as runtime:
        one, other = (Training(OPTIONS, replace(recipe, fp8=fp8), text, 0, runtime) for fp8 in (False, True))
        assert one.evaluate(OPTIONS.eval_tokens) == other.evaluate(OPTIONS.eval_tokens)
        bits = []
        for training in (one, other):
            training.train(16)
            bits.append(training.evaluate(OPTIONS.eval_tokens).bits_per_byte)
    assert bits[0] != bits[1] and bits[0] == pytest.approx(bits[1], rel=0.02)


def test_the_table_shows_the_difference() -> None:
    ours = mean_curve([[Point(100, 2.0, 1.5)], [Point(100, 4.0, 1.7)]])
    assert ours == [Point(100, 3.0, 1.6)]
    rows = table({"this": ours, "2025": [Point(100, 2.0, 1.7)]}).splitlines()
    assert rows[2] == "| 100 | 3 | 1.6000 | 2 | 1.7000 | 0.1000 |"
