"""Evaluation results of checkpoints: scores per task, their centered mean, and the files in report/ that hold them."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nanochat import paths
from nanochat.errors import UserError
from nanochat.train.checkpoint import Checkpoint
from nanochat.units import format_duration
from nanochat.untrusted import check_types, read_json, reading

IDENTITY_QUESTIONS = 5


@dataclass(frozen=True)
class TaskScore:
    """Score of a model on one task. Shares are 0 to 1."""

    task: str
    problems: int
    accuracy: float
    baseline: float  # accuracy of guessing

    def __post_init__(self) -> None:
        check_types(vars(self), {"task": str, "problems": int, "accuracy": float, "baseline": float})
        if self.problems < 1 or self.accuracy > 1 or self.baseline >= 1:
            raise ValueError(f"not a score: {self}")

    @property
    def centered(self) -> float:
        """0 for guessing, 1 if every answer is right, negative if worse than guessing."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.problems)


@dataclass(frozen=True)
class StageEvalConfig:
    """Size of the evaluation that every stage gets."""

    dataset: list[str]  # held-out text for bits per byte
    eval_tokens: int  # maximum number of tokens of that text
    problems: int  # number of held-out sums; a fifth as many words to spell, and to count letters in


@dataclass
class StageResult:
    """One row of the table of stages. Shares are 0 to 1."""

    source: str
    tag: str
    step: int
    bits_per_byte: float
    identity: float
    arithmetic: float
    spelling: float
    seconds: float  # training time of this stage

    def __post_init__(self) -> None:
        check_types(vars(self), {"source": str, "tag": str, "step": int, "bits_per_byte": float, "seconds": float})

    def task_scores(self, problems: int) -> list[TaskScore]:
        """The shares as scores. `problems` is that of the StageEvalConfig."""
        return [
            TaskScore("identity", IDENTITY_QUESTIONS, self.identity, 0.0),
            TaskScore("arithmetic", problems, self.arithmetic, 0.0),
            TaskScore("spelling", 2 * (problems // 5), self.spelling, 0.0),
        ]


def centered_mean(scores: Sequence[TaskScore]) -> float:
    """Mean of the centered scores: the CORE and ChatCORE metrics."""
    return sum(score.centered for score in scores) / len(scores)


def centered_mean_error(scores: Sequence[TaskScore]) -> float:
    """Standard error of `centered_mean`: those of the tasks, which are independent, added in quadrature."""
    return math.hypot(*(score.standard_error / (1 - score.baseline) for score in scores)) / len(scores)


def result_file(checkpoint: Checkpoint, suffix: str) -> Path:
    """report/<source>-<tag>-<step><suffix>.json"""
    return paths.report_dir() / f"{checkpoint.source}-{checkpoint.tag}-{checkpoint.step:06d}{suffix}.json"


def saved_result(checkpoint: Checkpoint, suffix: str) -> tuple[dict[str, Any], Any] | None:
    """Read (key, result) of an earlier evaluation; None if it is damaged or from another checkpoint."""
    path = result_file(checkpoint, suffix)
    with suppress(UserError), reading(path, "ignored"):
        saved = read_json(path)
        key, result = saved["key"], saved["result"]
        scores = [TaskScore(**s) for s in result] if suffix else StageResult(**result).task_scores(key["problems"])
        if scores and key["saved_at"] == checkpoint.meta["saved_at"]:
            return key, result
    return None


def stage_table(results: Sequence[StageResult]) -> Table:
    """One row per stage; fits in 80 columns."""
    table = Table(title="What each stage taught")
    for heading in ("stage", "step", "bits/byte", "identity", "arithmetic", "spelling", "time"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for r in results:
        shares = (f"{share:.1%}" for share in (r.identity, r.arithmetic, r.spelling))
        table.add_row(r.source, str(r.step), f"{r.bits_per_byte:.3f}", *shares, format_duration(r.seconds))
    return table


def score_table(name: str, scores: dict[str, list[TaskScore]]) -> Table:
    """One row per task, one column per stage; the centered mean of several as last row. Fits in 80 columns."""
    table = Table(title=f"{name}: % correct ± standard error", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("task", "guess", *scores):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for row in zip(*scores.values(), strict=True):
        cells = (f"{100 * score.accuracy:.1f} ±{100 * score.standard_error:.1f}" for score in row)
        table.add_row(row[0].task.removeprefix("bigbench_"), f"{100 * row[0].baseline:.0f}", *cells)
    if table.row_count > 1:
        means = (f"{centered_mean(column):.3f}±{centered_mean_error(column):.3f}" for column in scores.values())
        table.add_row(name, "0", *means, style="bold")
    return table
