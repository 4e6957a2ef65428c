"""The loop learns, counts right and resumes exactly."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import paths
from nanochat.data.batches import Batch, StepData
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.model.gpt import GPTConfig
from nanochat.model.loss import IGNORE
from nanochat.runtime import COMPILE_THRESHOLD, Runtime
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint, resume
from nanochat.train import run as run_module
from nanochat.train.checkpoint import MODEL_FILE
from nanochat.train.loop import train
from nanochat.train.options import PretrainOptions, TrainOptions, inherit
from nanochat.train.run import TrainingRun
from nanochat.train.scaling import lr_multiplier, matrix_lr_factor, scale_options
from tests.training import HOW, OPTIONS, SEQUENCE_LEN, FewRows, batches, begin, flip_a_byte, losses


@pytest.fixture
def runtime(base_dir: Path) -> Iterator[Runtime]:
    with Runtime.start("cpu") as runtime:
        yield runtime


def test_training_learns_a_small_batch_by_heart(runtime: Runtime, tokenizer: Tokenizer) -> None:
    run = begin(runtime, tokenizer)
    train(run, batches(FewRows(8)), 60, **HOW)
    first, *_, last = losses(run)
    assert first == pytest.approx(math.log(512), abs=0.01) and last < 0.1


def test_the_machine_s_state_is_logged_with_each_step(runtime: Runtime, tokenizer: Tokenizer) -> None:
    run = begin(runtime, tokenizer)
    train(run, batches(FewRows(8)), 2, **HOW)
    for row in read_steps(run.folder / "metrics.jsonl"):
        assert row["memory_available_bytes"] > 0 and row["page_cache_bytes"] >= 0
        assert not any(name.startswith(("gpu_", "energy")) for name in row)  # not available on a CPU


def test_micro_batches_do_not_change_the_result(runtime: Runtime, tokenizer: Tokenizer) -> None:
    figures = []
    for size in (8, 3):
        options = replace(OPTIONS, device_batch_size=size, model_tag=f"size{size}")
        run = begin(runtime, tokenizer, options)
        train(run, batches(FewRows(), options), 4, **HOW)
        figures.append(losses(run))
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_a_resumed_run_is_bit_for_bit_the_one_never_stopped(runtime: Runtime, tokenizer: Tokenizer) -> None:
    straight = begin(runtime, tokenizer, replace(OPTIONS, model_tag="straight"))
    train(straight, batches(FewRows()), 8, **HOW)
    options = replace(OPTIONS, model_tag="stopped", save_every=3, num_iterations=8)

    class Stops:
        """Data that ends in the middle of a run, after a checkpoint at step 6."""

        def step_data(self, step: int) -> StepData:
            if step == 7:
                raise KeyboardInterrupt
            return batches(FewRows()).step_data(step)

    with pytest.raises(KeyboardInterrupt):
        train(begin(runtime, tokenizer, options), Stops(), 8, **HOW)
    resumed = begin(runtime, tokenizer, options)
    assert resumed.step == 6
    train(resumed, batches(FewRows()), 8, **HOW)
    assert losses(resumed) == losses(straight)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ctrl_c_finishes_the_step_saves_and_loses_nothing(runtime: Runtime, tokenizer: Tokenizer) -> None:
    straight = begin(runtime, tokenizer, replace(OPTIONS, model_tag="straight"))
    train(straight, batches(FewRows()), 6, **HOW)

    class PressesCtrlC:
        def step_data(self, step: int) -> StepData:
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return batches(FewRows()).step_data(step)

    options = replace(OPTIONS, model_tag="stopped")
    with pytest.raises(KeyboardInterrupt):
        train(begin(runtime, tokenizer, options), PressesCtrlC(), 6, **HOW)
    resumed = begin(runtime, tokenizer, options)
    assert resumed.step == 3
    train(resumed, batches(FewRows()), 6, **HOW)
    assert losses(resumed) == losses(straight)


def test_a_second_ctrl_c_ends_at_once(runtime: Runtime, tokenizer: Tokenizer) -> None:
    class PressesTwice:
        def step_data(self, step: int) -> StepData:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    run = begin(runtime, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(run, PressesTwice(), 6, **HOW)
    assert run.step == 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_options_do_not_bend_a_resumed_run(runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 1, **HOW)
    with pytest.raises(UserError, match=r"--seed.*42.*43|--seed.*43.*42"):
        begin(runtime, tokenizer, replace(OPTIONS, seed=43))
    assert begin(runtime, tokenizer, replace(OPTIONS, device_batch_size=2, save_every=5)).step == 1


def test_a_complete_run_is_not_trained_further(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 3, **HOW)
    again = begin(runtime, tokenizer)
    train(again, batches(FewRows()), 3, **HOW)
    assert again.step == 3 and len(losses(again)) == 3
    assert "complete" in capsys.readouterr().out


def test_fresh_sets_the_old_run_aside(runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 2, **HOW)
    run = begin(runtime, tokenizer, replace(OPTIONS, fresh=True))
    assert run.step == 0
    (kept,) = (paths.checkpoints_dir("base") / "aside").iterdir()
    assert kept.name.startswith("test.") and checkpoint.checkpoints(kept)[0].step == 2
    with pytest.raises(UserError):  # and is nobody's parent
        resume.parent_of("mid", None, runtime)


def test_pretraining_on_other_text_is_refused_and_other_conversations_begin_anew(
    runtime: Runtime, tokenizer: Tokenizer
) -> None:
    config = GPTConfig.from_depth(2, tokenizer.vocab_size, SEQUENCE_LEN)
    base = resume.start_or_resume("base", OPTIONS, runtime, tokenizer, config=config, data="8 shards")
    train(base, batches(FewRows()), 1, **HOW)
    with pytest.raises(UserError, match=r"8 shards.*9 shards|9 shards.*8 shards"):
        resume.start_or_resume("base", OPTIONS, runtime, tokenizer, config=config, data="9 shards")
    parent = resume.parent_of("mid", None, runtime)
    mid = resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent, data="old")
    train(mid, batches(FewRows()), 1, **HOW)
    assert resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent, data="old").step == 1
    assert resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent, data="new").step == 0


def test_a_run_of_another_shape_is_refused(runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 1, **HOW)
    with pytest.raises(UserError, match=r"n_layer.*--fresh"):
        resume.start_or_resume("base", OPTIONS, runtime, tokenizer, config=GPTConfig.from_depth(3, 512, SEQUENCE_LEN))


def test_the_next_stage_starts_from_the_newest_parent_and_again_when_the_parent_changes(
    runtime: Runtime, tokenizer: Tokenizer
) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 1, **HOW)
    parent = resume.parent_of("mid", None, runtime)
    mid = resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent)
    assert torch.equal(mid.model.lm_head.weight, begin(runtime, tokenizer).model.lm_head.weight)
    train(mid, batches(FewRows()), 2, **HOW)
    assert resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent).step == 2
    train(begin(runtime, tokenizer), batches(FewRows()), 2, **HOW)
    changed = resume.parent_of("mid", None, runtime)
    assert resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=changed).step == 0


@pytest.mark.parametrize("accident", ["damaged", "deleted"])
def test_a_run_goes_on_without_its_parent(runtime: Runtime, tokenizer: Tokenizer, accident: str) -> None:
    options = replace(OPTIONS, save_every=1)
    base = begin(runtime, tokenizer, options)
    train(base, batches(FewRows()), 2, **HOW)

    def mid(fresh: bool = False) -> TrainingRun:
        asked = replace(options, fresh=fresh)
        parent = resume.parent_of("mid", None, runtime, fresh=fresh)
        return resume.start_or_resume("mid", asked, runtime, tokenizer, parent=parent, data="talk")

    train(mid(), batches(FewRows()), 1, **HOW)
    if accident == "damaged":
        flip_a_byte(base.folder / "step_000002" / MODEL_FILE)
    else:
        shutil.rmtree(base.folder)
    resumed = mid()
    assert resumed.step == 1 and resumed.parent and resumed.parent["step"] == 2
    train(resumed, batches(FewRows()), 2, **HOW)
    if accident == "damaged":
        restarted = mid(fresh=True)
        assert restarted.step == 0 and restarted.parent and restarted.parent["step"] == 1
    else:
        with pytest.raises(UserError, match=r"\./pretrain\.sh"):
            mid(fresh=True)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_clock_that_was_set_back_hides_no_new_parent(
    runtime: Runtime, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 2, **HOW)
    mid = resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=resume.parent_of("mid", None, runtime))
    train(mid, batches(FewRows()), 1, **HOW)
    monkeypatch.setattr(run_module.time, "time", lambda: 1.0)
    steps = 1 if restarted else 3
    train(begin(runtime, tokenizer, replace(OPTIONS, fresh=restarted)), batches(FewRows()), steps, **HOW)
    parent = resume.parent_of("mid", None, runtime)
    assert (parent.source, parent.step) == ("base", steps)
    assert resume.start_or_resume("mid", OPTIONS, runtime, tokenizer, parent=parent).step == 0


def test_a_run_whose_parent_has_no_digest_is_resumed(runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 2, **HOW)
    parent = resume.parent_of("mid", None, runtime)
    before = {key: parent.meta[key] for key in ("source", "tag", "step", "saved_at")}
    assert checkpoint.is_same(before, parent.identity) and checkpoint.is_same(None, None)
    assert not checkpoint.is_same(before | {"saved_at": 1.0}, parent.identity) and not checkpoint.is_same(None, before)
    assert checkpoint.is_same(parent.identity | {"saved_at": 1.0}, parent.identity)


def test_a_run_says_what_it_is_and_keeps_what_the_model_wrote(runtime: Runtime, tokenizer: Tokenizer) -> None:
    run = begin(runtime, tokenizer)
    train(run, batches(FewRows()), 20, **HOW)
    facts = json.loads((run.folder / "run.json").read_text())
    assert (facts["source"], facts["num_iterations"], facts["trained_on"]) == ("base", 20, "few rows")
    assert facts["num_parameters"] == sum(p.numel() for p in run.model.parameters())
    written = read_steps(run.folder / "samples.jsonl")
    assert [row["step"] for row in written] == list(range(2, 21, 2)) and written[0]["samples"] == ["well ..."]


def test_a_missing_stage_names_the_script_to_run(runtime: Runtime) -> None:
    for source, script in (("mid", "pretrain"), ("sft", "midtrain"), ("rl", "sft")):
        with pytest.raises(UserError, match=rf"\./{script}\.sh"):
            resume.parent_of(source, None, runtime)


def test_steps_with_nothing_to_learn_change_nothing(runtime: Runtime, tokenizer: Tokenizer) -> None:
    class Nothing:
        def step_data(self, step: int) -> StepData:
            if step == 0:
                return StepData([], {})
            zeros = torch.zeros(2, SEQUENCE_LEN, dtype=torch.long)
            return StepData([Batch(zeros, torch.full_like(zeros, IGNORE))], {})

    run = begin(runtime, tokenizer)
    before = run.model.embed_tokens.weight.detach().clone()
    train(run, Nothing(), 2, **HOW)
    assert torch.equal(run.model.embed_tokens.weight, before) and losses(run) == [0.0, 0.0]


def test_a_step_that_is_not_finite_is_left_out(runtime: Runtime, tokenizer: Tokenizer) -> None:
    class OneBadStep:
        def step_data(self, step: int) -> StepData:
            data = batches(FewRows()).step_data(step)
            weight = math.nan if step == 1 else 1.0
            return StepData([b._replace(weights=torch.full(b.targets.shape, weight)) for b in data.batches], {})

    run = begin(runtime, tokenizer)
    train(run, OneBadStep(), 3, **HOW)
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert run.optimizer.param_groups[0]["step"] == 2


def test_too_many_bad_steps_end_the_run(runtime: Runtime, tokenizer: Tokenizer) -> None:
    class Bad:
        def step_data(self, step: int) -> StepData:
            data = batches(FewRows()).step_data(step)
            return StepData([b._replace(weights=torch.full(b.targets.shape, math.inf)) for b in data.batches], {})

    with pytest.raises(UserError, match="finite"):
        train(begin(runtime, tokenizer), Bad(), 50, **HOW)


def test_learning_rate_rises_stays_and_falls() -> None:
    options = TrainOptions(warmup_ratio=0.2, warmdown_ratio=0.4, final_lr_frac=0.1, init_lr_frac=0.5)
    scales = [lr_multiplier(step, 10, options) for step in range(10)]
    assert scales[:7] == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert scales[7:] == pytest.approx([0.5 * (s + (1 - s) * 0.1) for s in (0.75, 0.5, 0.25)])


@pytest.mark.parametrize(
    ("depth", "tokens", "batch", "rate"),
    [
        (2, 6_553_600, 4096, 0.0117),
        (3, 2_457_600, 2048, 0.0104),
        (20, 4.8e9, 262_144, 0.0177),
        (26, 1e10, 524_288, 0.02),
    ],
)
def test_batch_and_muons_rate_follow_from_the_tokens(
    runtime: Runtime, depth: int, tokens: float, batch: int, rate: float
) -> None:
    config = GPTConfig.from_depth(depth, 8192, 512)
    options = PretrainOptions(depth=depth, target_param_data_ratio=tokens / config.num_multiplied)
    scaled = scale_options(options, config, runtime)
    assert scaled.total_batch_size == batch and scaled.num_iterations == round(tokens / batch)
    assert 0.02 * matrix_lr_factor(batch, scaled.num_iterations) == pytest.approx(rate, abs=5e-5)


def test_a_resumed_run_keeps_its_rate_of_muon(runtime: Runtime, tokenizer: Tokenizer) -> None:
    config = GPTConfig.from_depth(1, tokenizer.vocab_size, SEQUENCE_LEN)

    def start(matrix_lr: float) -> TrainingRun:  # the rate that would follow from the steps
        return resume.start_or_resume("base", OPTIONS, runtime, tokenizer, config=config, matrix_lr=matrix_lr)

    run = start(0.015)
    assert run.options.matrix_lr == run.optimizer.param_groups[0]["initial_lr"] == 0.015
    train(run, batches(FewRows()), 2, **HOW)
    assert start(0.018).options.matrix_lr == start(0.01).options.matrix_lr == 0.015


@pytest.mark.parametrize(
    "wrong",
    [{"device_batch_size": 0}, {"num_iterations": -3}, {"keep_last": 0}, {"save_every": -1}, {"warmdown_ratio": 1.5}],
)
def test_an_option_out_of_range_is_named_with_its_value(wrong: dict[str, Any]) -> None:
    ((option, value),) = wrong.items()
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}.*{value}"):
        replace(OPTIONS, **wrong)


def test_options_are_inherited_where_they_are_open() -> None:
    mine = TrainOptions(matrix_lr=0.1)
    merged = inherit(mine, {"matrix_lr": 0.02, "device_batch_size": 4, "fresh": True, "gone": 1})
    assert (merged.matrix_lr, merged.device_batch_size, merged.fresh) == (0.1, 4, False)


def test_whether_a_run_is_compiled(tokenizer: Tokenizer, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "can_compile", lambda self: True)
    run = begin(runtime, tokenizer)
    width = run.model.config.n_layer * run.model.config.n_embd
    steps = round(COMPILE_THRESHOLD / width / 1000)  # of 1,000 tokens
    assert not run.should_compile(steps - 1, 1000) and run.should_compile(steps + 1, 1000)
    assert not run.should_compile(10 * steps, None)  # many shapes
    run.runtime = replace(runtime, world=World(0, 4))
    assert not run.should_compile(4 * steps - 4, 1000) and run.should_compile(4 * steps + 4, 1000)
    run.options = replace(run.options, compile=True)
    assert run.should_compile(1, 1000)
    run.options = replace(run.options, compile=False)
    assert not run.should_compile(10 * steps, 1000) and not run.should_compile(1, None)
