"""Evaluation results of checkpoints: scores per task, their centered mean, and the files in report/ that hold them."""

import math
from collections.abc import Mapping, Sequence
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

STAGES_TABLE = "stages"
"""Name of the benchmark that every stage gets: bits per byte, identity, arithmetic, spelling."""
CENTERED = ("CORE", "ChatCORE")  # benchmarks whose tasks have a common mean
BENCHMARKS = (STAGES_TABLE, *CENTERED, "tasks")  # the last one: those given with --task


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
class Result:
    """Result of one checkpoint on one benchmark."""

    scores: list[TaskScore]
    bits_per_byte: float | None = None  # of held-out text, in the table of stages


def centered_mean(scores: Sequence[TaskScore]) -> float:
    """Mean of the centered scores: the CORE and ChatCORE metrics."""
    return sum(score.centered for score in scores) / len(scores)


def centered_mean_error(scores: Sequence[TaskScore]) -> float:
    """Standard error of `centered_mean`: those of the tasks, which are independent, added in quadrature."""
    return math.hypot(*(score.standard_error / (1 - score.baseline) for score in scores)) / len(scores)


def result_file(checkpoint: Checkpoint, benchmark: str) -> Path:
    """report/<source>-<tag>-<step>.json for the table of stages, else report/<source>-<tag>-<step>-<benchmark>.json"""
    suffix = "" if benchmark == STAGES_TABLE else f"-{benchmark.lower()}"
    return paths.report_dir() / f"{checkpoint.source}-{checkpoint.tag}-{checkpoint.step:06d}{suffix}.json"


def saved_result(checkpoint: Checkpoint, benchmark: str) -> tuple[dict[str, Any], Result] | None:
    """Read (key, result) of an earlier evaluation; None if it is damaged or from another checkpoint."""
    path = result_file(checkpoint, benchmark)
    with suppress(UserError), reading(path, "ignored"):
        saved = read_json(path)
        key, result = saved["key"], saved["result"]
        if isinstance(result, list):  # as version 0.1.0 wrote CORE and ChatCORE
            result = {"scores": result, "bits_per_byte": None}
        has_bits = benchmark == STAGES_TABLE
        check_types(result, {"scores": list, "bits_per_byte": float if has_bits else float | None})
        scores = [TaskScore(**score) for score in result["scores"]]
        if scores and key["saved_at"] == checkpoint.meta["saved_at"]:
            return key, Result(scores, result["bits_per_byte"])
    return None


def stage_table(results: Mapping[Checkpoint, Result]) -> Table:
    """One row per stage; fits in 80 columns."""
    table = Table(title="What each stage taught")
    tasks = [score.task for score in next(iter(results.values())).scores]
    for heading in ("stage", "step", "bits/byte", *tasks, "time"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for found, result in results.items():
        shares = (f"{score.accuracy:.1%}" for score in result.scores)
        time = format_duration(found.meta["seconds"])
        table.add_row(found.source, str(found.step), f"{result.bits_per_byte:.3f}", *shares, time)
    return table


def score_table(name: str, results: Mapping[str, Result]) -> Table:
    """One row per task, one column per stage; the centered mean of several as last row. Fits in 80 columns."""
    table = Table(title=f"{name}: % correct ± standard error", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    scores = [result.scores for result in results.values()]
    for heading in ("task", "guess", *results):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for row in zip(*scores, strict=True):
        cells = (f"{100 * score.accuracy:.1f} ±{100 * score.standard_error:.1f}" for score in row)
        table.add_row(row[0].task.removeprefix("bigbench_"), f"{100 * row[0].baseline:.0f}", *cells)
    if table.row_count > 1:
        means = (f"{centered_mean(column):.3f}±{centered_mean_error(column):.3f}" for column in scores)
        table.add_row(name, "0", *means, style="bold")
    return table
