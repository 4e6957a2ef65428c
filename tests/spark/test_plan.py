"""What a model will take."""

import re

import pytest

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.spark.plan import Machine, Stage, disk, flops_per_token, machines, stages
from nanochat.spark.plan_table import count, duration, stage_table
from nanochat.train.memory import checkpoint_bytes
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from scripts import plan

D20 = GPTConfig.from_depth(20, 65_536, 2048)
BASE_TOKENS = 20.0 * D20.num_parameters


def test_the_operations_are_those_that_the_trainer_counts() -> None:
    config = GPTConfig.from_depth(3, 512, 64)
    assert flops_per_token(config) == GPT(config).flops_per_token()


def test_a_checkpoint_has_the_size_of_the_tensors_in_it() -> None:
    model = GPT(GPTConfig.from_depth(3, 512, 64))
    state = {**model.state_dict(), **MuonAdamW(model, OptimizerOptions()).state}
    assert checkpoint_bytes(model.config) == sum(tensor.nbytes for tensor in state.values())


def test_the_published_runs_come_out_as_published() -> None:
    """d20 in nine days on a Spark; d32 at 1.574 s for 524,288 tokens on eight H100."""
    one, _, _, eight = machines(2)
    assert one.hours(stages(D20, BASE_TOKENS)[0]) == pytest.approx(9 * 24, rel=0.02)
    d32 = GPTConfig.from_depth(32, 65_536, 2048)
    assert eight.flops / flops_per_token(d32) == pytest.approx(524_288 / 1.574, rel=0.01)


def test_more_sparks_take_less_time_and_about_the_same_energy() -> None:
    (one, two, *_), (work, *_) = machines(2), stages(D20, BASE_TOKENS)
    assert two.hours(work) == pytest.approx(one.hours(work) / 2 / 0.97)
    assert two.kwh(work) == pytest.approx((one.kwh(work) or 0) / 0.97)


def test_energy_is_power_times_time_and_nothing_where_power_is_unknown() -> None:
    work = Stage("pretrain", 1.0, 3.6e18)
    assert Machine("a", 1e15, 1e9, 500, ()).kwh(work) == pytest.approx(0.5)
    assert Machine("a", 1e15, 1e9, None, ()).kwh(work) is None


def test_the_disk_holds_text_tokens_and_two_checkpoints_of_each_stage_and_one_more() -> None:
    room = disk(D20, num_shards=240, keep_last=2)
    assert room.text == pytest.approx(24e9)
    assert room.checkpoints == 9 * room.checkpoint
    assert room.total == pytest.approx(room.text + room.tokens + room.tasks + room.checkpoints)


def test_plan_fits_80_columns_and_names_where_each_figure_is_from(
    capsys: pytest.CaptureFixture[str], base_dir: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_PRICE_PER_KWH", "0.5")
    plan.main(plan.PlanOptions(depth=20))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "561M parameters, 11.2B tokens" in said and "21,400 of 524,288" in said and "240 shards" in said
    assert all(f"{name}: " in said for name in ("GB10", "2 x GB10", "H100", "8 x H100"))
    together = re.search(r"together +[\d.]+ d +(\d+)", said)
    cost = re.search(r"at 0.5 a kWh +([\d.]+)", said)
    assert together and cost and float(cost[1]) == pytest.approx(float(together[1]) / 2, abs=0.3)


@pytest.mark.parametrize(("number", "text"), [(560_988_160, "561M"), (11.2e9, "11.2B"), (999.9e6, "1B"), (12, "12")])
def test_counts_are_short(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("hours", "text"), [(217.7, "9.1 d"), (8.65, "8.7 h"), (0.45, "27 min"), (0.005, "18 s")])
def test_durations_are_short(hours: float, text: str) -> None:
    assert duration(hours) == text


def test_the_table_has_a_line_for_each_stage_and_their_sum() -> None:
    lines = stage_table(stages(D20, BASE_TOKENS), machines(2), None)
    assert [line.split()[0] for line in lines[1:]] == ["pretrain", "midtrain", "sft", "rl", "together"]


def test_one_machine_has_no_link_and_the_user_s_watts_win() -> None:
    one, same, *_ = machines(1, 100)
    assert (one.flops, one.watts) == (same.flops, same.watts) and one.watts == 100


@pytest.mark.parametrize("depth", [8, 32])
def test_the_columns_stand_apart(depth: int) -> None:
    config = GPTConfig.from_depth(depth, 65_536, 2048)
    for line in stage_table(stages(config, 20.0 * config.num_parameters), machines(2), None):
        assert all(line[at : at + 2] == "  " for at in (19, 34, 49, 64))
