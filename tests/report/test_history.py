"""The report reads the files of a model's stages, and no others."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.eval.results import result_file
from nanochat.report import build
from nanochat.report.history import newest_folder, newest_stages
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.loop import train
from tests.report.conftest import train_mid
from tests.training import HOW, OPTIONS, FewRows, batches, begin


def test_a_stage_follows_its_ancestors(trained: Path) -> None:
    base, mid = newest_stages()
    assert (base.source, base.step, base.is_finished) == ("base", 24, True)
    assert (mid.source, mid.step, mid.facts["parent"]["step"]) == ("mid", 3, 24)
    steps, values = base.series("bpb")
    assert steps == [8, 16, 24] and values == pytest.approx([1.92, 1.84, 1.76])
    assert base.tokens == 24 * 8 * 32
    assert 0 < base.seconds < 300
    assert [sample["step"] for sample in mid.samples] == [1, 2, 3]


def test_the_newest_stage_selects_the_model(trained: Path, runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer, replace(OPTIONS, model_tag="other")), batches(FewRows()), 1, **HOW)
    assert [stage.facts["tag"] for stage in newest_stages()] == ["other"]
    assert [stage.source for stage in newest_stages("test")] == ["base", "mid"]
    with pytest.raises(UserError, match="unknown"):
        newest_stages("unknown")


def test_a_parent_that_was_set_aside_is_still_the_parent(trained: Path, runtime: Runtime, tokenizer: Tokenizer) -> None:
    aside = trained / "base_checkpoints" / "aside" / "test.20260101-000000"
    aside.parent.mkdir()
    (trained / "base_checkpoints" / "test").rename(aside)
    assert [(stage.source, stage.step) for stage in newest_stages()] == [("base", 24), ("mid", 3)]


def test_a_circle_of_parents_ends(trained: Path) -> None:
    facts = trained / "base_checkpoints" / "test" / "run.json"
    mid = checkpoint.find("mid").meta
    parent = {key: mid[key] for key in ("source", "tag", "step", "saved_at")}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"parent": parent}))
    assert [stage.source for stage in newest_stages()] == ["base", "mid"]


ODD_LINES = [
    "null", "[]", "7", '"x"', "{}", "[" * 100_000, '{"step": null}', '{"step": "2"}', '{"step": -1}', '{"step": 1e99}',
    '{"step": 25, "loss": "x"}', '{"step": 25, "tokens": null}', '{"step": 25, "seconds": [1]}', '{"step": 25}',
    '{"step": 25, "loss": NaN, "mfu": Infinity}', '{"step": 25, "loss": 1e308}', '{"step": 25, "loss": {"a": 1}}',
    '{"step": 25, "mfu": ' + "9" * 400 + "}", '{"step": ' + "9" * 5000 + "}", "\udcff", "\x00\x1b[2J",
]  # fmt: skip


def test_odd_lines_of_a_run_log_do_not_matter(trained: Path) -> None:
    log = trained / "mid_checkpoints" / "test" / "metrics.jsonl"
    with log.open("a", errors="surrogateescape") as file:
        file.writelines(line + "\n" for line in ODD_LINES)
    assert build.write().exists()
    assert newest_stages()[-1].tokens == 3 * 8 * 32


@pytest.mark.parametrize(
    "change",
    [{"source": "x"}, {"tag": None}, {"num_iterations": "x"}, {"model_config": []}, {"options": 7}, {"parent": "base"}],
)
def test_damaged_facts_of_a_run_are_named(trained: Path, change: dict[str, object]) -> None:
    facts = trained / "mid_checkpoints" / "test" / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | change))
    with pytest.raises(UserError, match=r"run\.json"):
        newest_stages()


def test_a_deleted_parent_is_left_out(trained: Path) -> None:
    (trained / "base_checkpoints" / "test").rename(trained / "elsewhere")
    assert [stage.source for stage in newest_stages()] == ["mid"]


def test_a_run_without_a_checkpoint_is_included(trained: Path) -> None:
    folder = trained / "chatsft_checkpoints" / "test"
    folder.mkdir(parents=True)
    facts = json.loads((trained / "mid_checkpoints" / "test" / "run.json").read_text())
    parent = {key: checkpoint.find("mid").meta[key] for key in ("source", "tag", "step", "saved_at")}
    (folder / "run.json").write_text(json.dumps(facts | {"source": "sft", "parent": parent, "num_iterations": 9}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "tokens": 5, "seconds": 2.5}\n{"step": 2, "lo')
    os.utime(folder / "metrics.jsonl", (2e9, 2e9))
    assert newest_folder() == folder
    *_, sft = newest_stages()
    assert (sft.source, sft.step, sft.is_finished, sft.checkpoint) == ("sft", 1, False, None)
    assert sft.results() == {}


def test_scores_are_those_of_this_checkpoint(trained: Path, runtime: Runtime, tokenizer: Tokenizer) -> None:
    mid = checkpoint.find("mid")
    result_file(mid, "tasks").parent.mkdir()
    score = {"task": "GSM8K", "problems": 50, "accuracy": 0.5, "baseline": 0.0}
    for name in ("ChatCORE", "tasks"):
        file = result_file(mid, name)
        file.write_text(json.dumps({"key": {"saved_at": mid.meta["saved_at"]}, "result": [score]}))
    results = newest_stages()[-1].results()
    assert [results[name].scores[0].problems for name in ("ChatCORE", "tasks")] == [50, 50]
    (trained / "mid_checkpoints" / "test").rename(trained / "elsewhere")
    train_mid(runtime, tokenizer)  # the same steps under the same name, but another model
    assert newest_stages()[-1].results() == {}
