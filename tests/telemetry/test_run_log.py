"""The messages and metrics of a run."""

import io
import json
import math
from pathlib import Path

import pytest

from nanochat.telemetry.run_log import ProgressDisplay, StepLog, energy_used, read_steps
from nanochat.units import format_duration


def test_metrics_survive_a_crash_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = StepLog(path, 0)
    for step in range(1, 6):
        log.log(step, {"loss": step / 2})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the crash
    assert [row["step"] for row in read_steps(path)] == [1, 2, 3, 4, 5]
    log = StepLog(path, 3)  # resumed from a checkpoint at step 3
    log.log(4, {"loss": 9.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_metrics_are_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')
    log = StepLog(path, 1)
    log.log(2, {"loss": math.inf, "lr": 0.5})
    log.close()
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null, "lr": 0.5}\n'


def test_energy_counts_the_steps_that_a_resume_takes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert energy_used(path) == 0.0
    path.write_text('{"step": 1}\n{"step": 2, "energy_j": 500.0}\n{"step": 3, "energy_j": 900.0}\n')
    assert energy_used(path) == 900.0  # whichever step it resumes at: the power is spent


def test_a_log_that_cannot_be_rewritten_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / ".metrics.jsonl.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        StepLog(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_terminal_progress_is_lines() -> None:
    out = io.StringIO()
    display = ProgressDisplay("base d4", 100, 0, out, None)
    for step in range(1, 101):
        display.update(step, f"loss {step}")
    display.close()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("base d4 1/100  loss 1") and lines[-1].startswith("base d4 100/100")
    assert len(lines) == 2  # the first and the last: the hundred steps took no ten seconds


def test_on_a_terminal_progress_is_a_bar_of_80_columns() -> None:
    out = io.StringIO()
    display = ProgressDisplay("base d4", 100, 0, out, None)
    display.update(50, "loss 3.21  4,000 tok/s")
    display.close()
    assert "50/100" in out.getvalue() and "loss 3.21" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7810, "2h10m"), (792_000, "9d04h"), (float("inf"), "?")],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_what_an_evaluation_found_joins_the_last_line_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path, 0)
    for step in (1, 2):
        log.log(step, {"loss": 1.0})
    log.amend(2, {"bpb": 0.5})
    log.amend(7, {"bpb": 0.1})  # a step that was never logged
    log.log(3, {"loss": 2.0})
    (tmp_path / ".metrics.jsonl.partial").mkdir()  # stands for a full disk
    log.amend(3, {"bpb": 0.4})
    log.log(4, {"loss": 3.0})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0, "bpb": 0.5},
        {"step": 3, "loss": 2.0},
        {"step": 4, "loss": 3.0},
    ]
