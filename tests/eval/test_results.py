import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nanochat.dist import World
from nanochat.eval.evaluate import EvalModel
from nanochat.eval.results import Result, TaskScore, centered_mean, centered_mean_error, score_table
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import META_FILE, Checkpoint
from tests.conftest import random_model


def test_scores_are_centered_on_guessing() -> None:
    scores = [TaskScore("a", 100, 0.625, 0.25), TaskScore("b", 50, 0.25, 0.5)]
    assert [score.centered for score in scores] == [0.5, -0.5]
    assert centered_mean(scores) == 0.0
    assert scores[0].standard_error == pytest.approx((0.625 * 0.375 / 100) ** 0.5)
    expected = ((0.375 * 0.625 / 100 / 0.75**2 + 0.25 * 0.75 / 50 / 0.5**2) ** 0.5) / 2
    assert centered_mean_error(scores) == pytest.approx(expected)


def test_the_table_of_four_stages_fits_80_columns() -> None:
    scores = [TaskScore("bigbench_language_identification", 20, 0.5, 0.091), TaskScore("copa", 10, 1.0, 0.5)]
    stages = dict.fromkeys(("base", "mid", "sft", "rl"), Result(scores))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(score_table("CORE", stages))
    out = capture.get()
    assert "…" not in out
    assert out.count("50.0 ±11.2") == out.count("100.0 ±0.0") == 4
    assert out.count(f"{centered_mean(scores):.3f}±{centered_mean_error(scores):.3f}") == 4


class Counted:
    """A benchmark whose accuracy is the number of times it ran."""

    name = "Counted"
    needs_chat = False

    def __init__(self) -> None:
        self.times = 0
        self.effort = 1

    def key(self) -> dict[str, Any]:
        return {"effort": self.effort}

    def evaluate(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> Result:
        self.times += 1
        on_task("counting")
        return Result([TaskScore("counting", batch_tokens, self.times / 10, 0.0)])


def test_scores_are_kept_until_what_they_depend_on_changes(base_dir: Path, tokenizer: Tokenizer) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, World())
    folder = base_dir / "chatsft_checkpoints" / "d2" / "step_000007"
    folder.mkdir(parents=True)
    (folder / META_FILE).write_text(json.dumps({"source": "sft", "saved_at": "one"}))
    found = Checkpoint(folder)
    model = EvalModel(found, runtime, 4)
    model.chat = ChatModel("sft", Engine(random_model(tokenizer.vocab_size, sequence_len=64), tokenizer))
    counted = Counted()
    said: list[str] = []
    first = model.result(counted, said.append)
    assert first == model.result(counted, said.append) == Result([TaskScore("counting", 256, 0.1, 0.0)])
    assert said == ["sft d2 step 7: counting"]
    file = base_dir / "report" / "sft-d2-000007-counted.json"
    assert json.loads(file.read_text())["key"] == {"saved_at": "one", "effort": 1}
    counted.effort = 2
    assert model.result(counted, said.append).scores[0].accuracy == 0.2
    found.meta["saved_at"] = "two"
    assert model.result(counted, said.append).scores[0].accuracy == 0.3
