"""The plan of a model before its run, and after its first steps."""

import re

import pytest

from nanochat.data.amount import tokens_for_depth
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.spark import disk
from nanochat.spark.plan import (
    MEASURED_STEPS,
    Machine,
    MeasuredPlan,
    StageWork,
    flops_per_token,
    format_count,
    pretraining,
    stage_table,
    stages_from,
)
from nanochat.train.checkpoint import checkpoint_bytes
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.units import format_duration
from scripts import plan, prepare
from scripts.plan import machines
from tests.spark.measured import CONFIG, STEP, take_steps

D20 = disk.default_config(20)
BASE_TOKENS = tokens_for_depth(20, disk.VOCAB_SIZE)


def test_flops_match_the_model() -> None:
    config = GPTConfig.from_depth(3, 512, 64)
    assert flops_per_token(config) == GPT(config).flops_per_token()


def test_a_checkpoint_has_the_size_of_the_tensors_in_it() -> None:
    model = GPT(GPTConfig.from_depth(3, 512, 64))
    tensors = [*model.state_dict().values(), *MuonAdamW(model, OptimizerOptions()).state_tensors]
    assert checkpoint_bytes(model.config) == sum(tensor.nbytes for tensor in tensors)


def test_the_published_speedrun_is_reproduced() -> None:
    """nanochat's d22 on 6.3 billion tokens, 88 to 99 minutes on eight H100, part of it in FP8."""
    *_, eight = machines(2)
    assert 60 * eight.hours(pretraining(disk.default_config(22), 6.3e9)) == pytest.approx(99, rel=0.02)


def test_short_rows_spare_three_quarters_of_the_attention() -> None:
    model = GPT(GPTConfig.from_depth(2, 512, 64))
    assert flops_per_token(model.config, 1.0) == model.flops_per_token(16)
    assert flops_per_token(model.config, 0.5) == (model.flops_per_token(16) + model.flops_per_token(64)) / 2


def test_decoding_is_bound_by_reading_weights_and_context() -> None:
    rl = stages_from("rl", D20, 0)[-1]
    (spark, *_) = machines(1)
    context = 128 * (2 * 2 * D20.n_layer * D20.n_kv_head * D20.head_dim) * (128 + 256 / 2)
    seconds = 200 * 256 / 128 * 256 * (8 * D20.num_parameters + context) / (273e9 / 2)
    learning = rl.tokens * flops_per_token(D20) * 4 / 3 / spark.flops
    assert rl.tokens == 200 * 256 * (128 + 256)
    assert spark.hours(rl) * 3600 == pytest.approx(seconds + learning)


def test_more_sparks_take_less_time_and_about_the_same_energy() -> None:
    (one, two, *_), (work, *_) = machines(2), stages_from("base", D20, BASE_TOKENS)
    assert two.hours(work) == pytest.approx(one.hours(work) / 2 / 0.97)
    assert two.kwh(work) == pytest.approx((one.kwh(work) or 0) / 0.97)


def test_energy_is_power_times_time_or_none_if_power_is_unknown() -> None:
    work = StageWork("base", 1.0, 3.6e18)
    assert Machine("a", 1e15, 500, ()).kwh(work) == pytest.approx(0.5)
    assert Machine("a", 1e15, None, ()).kwh(work) is None


def test_the_disk_holds_text_tokens_and_two_checkpoints_of_each_stage_and_one_more() -> None:
    space = disk.disk_space(20)
    assert space.num_shards == 104 and space.text == pytest.approx(10.4e9)
    assert space.checkpoints == 9 * space.checkpoint == 9 * checkpoint_bytes(D20)
    assert space.total == pytest.approx(space.download + space.tokens + space.checkpoints)


def test_the_vocabulary_is_that_of_prepare() -> None:
    assert prepare.PrepareOptions().vocab_size == disk.VOCAB_SIZE


def test_plan_fits_80_columns_and_names_its_sources(
    capsys: pytest.CaptureFixture[str], base_dir: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_PRICE_PER_KWH", "0.5")
    plan.main(plan.PlanOptions(depth=20))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "477M parameters, 4.79B tokens" in said and "18,260 of 262,144" in said and "104 shards" in said
    assert all(f"{name}: " in said for name in ("GB10", "2 x GB10"))
    total = re.search(r"total +\w+ +([\d.]+)", said)
    cost = re.search(r"at 0.5/kWh +([\d.]+)", said)
    assert total and cost and float(cost[1]) == pytest.approx(float(total[1]) / 2, rel=0.01)


@pytest.mark.parametrize(("number", "text"), [(560_988_160, "561M"), (11.2e9, "11.2B"), (999.9e6, "1B"), (12, "12")])
def test_counts_are_short(number: float, text: str) -> None:
    assert format_count(number) == text


def test_the_table_has_one_line_per_stage_and_a_total() -> None:
    lines = stage_table(stages_from("base", D20, BASE_TOKENS), machines(2), None)
    assert [line.split()[0] for line in lines[1:]] == ["base", "mid", "sft", "rl", "total"]


def test_one_machine_has_no_link_and_given_watts_take_precedence() -> None:
    one, same, *_ = machines(1, 100)
    assert (one.flops, one.watts) == (same.flops, same.watts) and one.watts == 100


@pytest.mark.parametrize("depth", [8, 32])
def test_the_columns_are_separated(depth: int) -> None:
    config = disk.default_config(depth)
    for line in stage_table(stages_from("base", config, tokens_for_depth(depth, disk.VOCAB_SIZE)), machines(2), None):
        assert all(line[at : at + 2] == "  " for at in (19, 34))


def test_after_twenty_steps_the_rest_is_estimate_once_at_the_speed_measured() -> None:
    said = take_steps(MeasuredPlan("base", CONFIG, 21_400))
    assert [i + 1 for i, lines in enumerate(said) if lines] == [MEASURED_STEPS]
    estimate, *table = said[MEASURED_STEPS - 1]
    assert "13,000 tokens/s" in estimate and "mfu 0.360" in estimate and "95 W" in estimate
    assert [line.split()[0] for line in table[2:]] == ["base", "mid", "sft", "rl", "total"]
    left = pretraining(CONFIG, (21_400 - 20) * STEP["tokens"])
    assert format_duration(left.flops / STEP["flops_per_second"]) in table[2]


def test_the_estimate_of_a_later_stage_starts_with_that_stage() -> None:
    (lines,) = [lines for lines in take_steps(MeasuredPlan("mid", CONFIG, 850)) if lines]
    assert [line.split()[0] for line in lines[3:]] == ["mid", "sft", "rl", "total"]


@pytest.mark.parametrize(("source", "steps"), [("base", 60), ("rl", 20_000)])
def test_short_runs_and_rl_print_no_estimate(source: str, steps: int) -> None:
    assert not any(take_steps(MeasuredPlan(source, CONFIG, steps)))


def test_nanochat_watts_counts_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: figure for name, figure in STEP.items() if name != "gpu_power_w"}
    monkeypatch.setenv("NANOCHAT_WATTS", "60")
    kwh = []
    for count in (1, 2):
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(count))  # as torchrun sets it
        plan = MeasuredPlan("base", CONFIG, 21_400)
        lines = [plan.step(i + 1, without) for i in range(MEASURED_STEPS)][-1]
        assert "60 W per machine" in lines[0]
        kwh.append(float(lines[-1].split()[-1].replace(",", "")))
    assert kwh[1] == pytest.approx(2 * kwh[0], rel=0.05)
