"""The plan, told anew from what a run measured."""

import json
from pathlib import Path

import pytest

from nanochat.model.gpt import GPTConfig
from nanochat.spark import replan
from nanochat.spark.plan import flops_per_token
from nanochat.spark.replan import MEASURED_STEPS, Replan

CONFIG = GPTConfig.from_depth(20, 65_536, 2048)
STEP = {
    "tokens": 524_288,
    "tokens_per_second": 13_000.0,
    "flops_per_second": 13_000.0 * flops_per_token(CONFIG),
    "mfu": 0.36,
    "gpu_power_w": 95.0,
}


def take_steps(plan: Replan, first: int = 1, **changes: float) -> list[list[str]]:
    slow = {**STEP, "tokens_per_second": 100.0, "flops_per_second": 1e12, "mfu": 0.01}  # it compiles
    steps = [slow] * 2 + [{**STEP, **changes}] * 40
    return [plan.step(first + i, metrics) for i, metrics in enumerate(steps)]


def test_after_twenty_steps_the_rest_is_told_once_at_the_speed_measured(tmp_path: Path) -> None:
    said = take_steps(Replan("base", CONFIG, 21_400, tmp_path))
    assert [i + 1 for i, lines in enumerate(said) if lines] == [MEASURED_STEPS]
    told, *table = said[MEASURED_STEPS - 1]
    assert "13,000 tokens/s" in told and "mfu 0.360" in told and "95 W by the GPU alone" in told
    assert [line.split()[0] for line in table[2:]] == ["pretrain", "midtrain", "sft", "rl", "together"]
    hours = json.loads((tmp_path / replan.FILE).read_text())["stages"][0]["hours"]
    assert hours == pytest.approx((21_400 - 20) * 524_288 / 13_000 / 3600)


def test_a_later_stage_has_only_what_comes_after_it(tmp_path: Path) -> None:
    (lines,) = [lines for lines in take_steps(Replan("mid", CONFIG, 850, tmp_path)) if lines]
    assert [line.split()[0] for line in lines[3:]] == ["midtrain", "sft", "rl", "together"]


@pytest.mark.parametrize(("source", "steps"), [("base", 60), ("rl", 20_000)])
def test_a_short_run_and_one_whose_steps_differ_are_not_planned(source: str, steps: int, tmp_path: Path) -> None:
    assert not any(take_steps(Replan(source, CONFIG, steps, tmp_path)))
    assert not (tmp_path / replan.FILE).exists()


def test_plan_reads_what_a_run_kept(tmp_path: Path) -> None:
    take_steps(Replan("base", CONFIG, 21_400, tmp_path))
    plan = replan.read(tmp_path / replan.FILE)
    assert plan is not None and plan.step == MEASURED_STEPS
    assert plan.machine.flops == pytest.approx(13_000 * flops_per_token(CONFIG)) and plan.machine.watts == 95
    assert [stage.name for stage in plan.stages] == ["pretrain", "midtrain", "sft", "rl"]
    (tmp_path / replan.FILE).write_text("{")
    assert replan.read(tmp_path / replan.FILE) is None


def test_a_run_that_begins_has_no_plan_of_one_before_it(tmp_path: Path) -> None:
    take_steps(Replan("base", CONFIG, 21_400, tmp_path))
    Replan("base", CONFIG, 21_400, tmp_path).step(21, STEP)  # a resume
    assert replan.read(tmp_path / replan.FILE)
    Replan("base", CONFIG, 60, tmp_path).step(1, STEP)
    assert not (tmp_path / replan.FILE).exists()


def test_where_no_power_is_measured_the_user_s_word_counts_for_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {name: figure for name, figure in STEP.items() if name != "gpu_power_w"}
    monkeypatch.setenv("NANOCHAT_WATTS", "60")
    kwh = []
    for count in (1, 2):
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(count))  # as torchrun sets it
        plan = Replan("base", CONFIG, 21_400, tmp_path)
        lines = [plan.step(i + 1, without) for i in range(MEASURED_STEPS)][-1]
        assert "60 W for each machine, as NANOCHAT_WATTS says" in lines[0]
        kept = replan.read(tmp_path / replan.FILE)
        assert kept and kept.stages[0].kwh
        kwh.append(kept.stages[0].kwh)
    assert kwh[1] == pytest.approx(2 * kwh[0])


def test_a_plan_whose_figures_are_no_numbers_is_not_read(tmp_path: Path) -> None:
    plan = {"flops": "fast", "bandwidth": 1.0, "watts": None, "source": "here"}
    (tmp_path / replan.FILE).write_text(json.dumps(plan))
    assert replan.read(tmp_path / replan.FILE) is None
