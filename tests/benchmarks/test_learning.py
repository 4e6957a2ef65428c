"""The benchmark of recipes: what makes its comparison fair."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.learning import (
    RECIPE_2025,
    BenchmarkOptions,
    Point,
    Recipe,
    mean_curve,
    point,
    prepare,
    table,
)
from benchmarks.training import Text
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import ShardedIds, TokenShards
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


def test_two_recipes_start_from_the_same_weights_and_read_the_same_rows(text: Text) -> None:
    with Runtime.start("cpu") as runtime:
        one, other = (
            prepare(OPTIONS, recipe, text, 3, runtime)
            for recipe in (
                Recipe(total_batch_size=64, short_rows_ratio=0.0),
                Recipe(total_batch_size=256, short_rows_ratio=0.0, warmdown_ratio=1.0),
            )
        )
        for name, weight in one.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])
        rows = [
            [row for step in range(training.num_iterations) for batch in training.batches.step_data(step).batches
             for row in batch.tokens.tolist()]
            for training in (one, other)
        ]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) == OPTIONS.tokens // OPTIONS.max_seq_len


def test_a_training_learns_and_counts_its_own_seconds(text: Text) -> None:
    recipe = replace(RECIPE_2025, total_batch_size=64)
    with Runtime.start("cpu") as runtime:
        training = prepare(OPTIONS, recipe, text, 0, runtime)
        before = point(training, OPTIONS.eval_tokens)
        training.train(8)
        halfway = point(training, OPTIONS.eval_tokens)
        training.train(16)
        after = point(training, OPTIONS.eval_tokens)
    assert (before.tokens, halfway.tokens, after.tokens) == (0, 512, 1024)
    assert before.seconds == 0 < halfway.seconds < after.seconds
    assert before.bits_per_byte > halfway.bits_per_byte > after.bits_per_byte


def test_fp8_is_the_same_recipe_in_other_arithmetic(text: Text) -> None:
    recipe = Recipe(total_batch_size=64)
    with Runtime.start("cpu") as runtime:
        plain, in_fp8 = (prepare(OPTIONS, replace(recipe, fp8=fp8), text, 0, runtime) for fp8 in (False, True))
        assert point(plain, OPTIONS.eval_tokens) == point(in_fp8, OPTIONS.eval_tokens)
        plain.train(16)
        in_fp8.train(16)
        one, other = (point(training, OPTIONS.eval_tokens).bits_per_byte for training in (plain, in_fp8))
    assert one != other and one == pytest.approx(other, rel=0.02)


def test_the_table_says_how_much_lower() -> None:
    ours = mean_curve([[Point(100, 2.0, 1.5)], [Point(100, 4.0, 1.7)]])
    assert ours == [Point(100, 3.0, 1.6)]
    assert (
        table({"this": ours, "2025": [Point(100, 2.0, 1.7)]}).splitlines()[2]
        == "| 100 | 3 | 1.6000 | 2 | 1.7000 | 0.1000 |"
    )
