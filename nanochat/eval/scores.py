"""Scores on several tasks as one number: each centred on what guessing gives, then averaged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task. Shares are 0 to 1."""

    task: str
    problems: int
    """how many were measured"""
    accuracy: float
    baseline: float
    """what guessing gives"""

    @property
    def centred(self) -> float:
        """0 for guessing, 1 for all right; negative for worse than guessing."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, sqrt(p (1 - p) / n): how far another draw of as many problems would be off."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.problems)


Scores = dict[str, list[TaskScore]]
"""Of each stage, by its name."""


def centred_mean(scores: Sequence[TaskScore]) -> float:
    """The mean of the centred scores: CORE, ChatCORE."""
    return sum(score.centred for score in scores) / len(scores)


def centred_mean_error(scores: Sequence[TaskScore]) -> float:
    """The standard error of `centred_mean`: the tasks' own, which are independent, in quadrature."""
    return math.hypot(*(score.standard_error / (1 - score.baseline) for score in scores)) / len(scores)


def score_table(name: str, stages: Scores) -> Table:
    """A line a task, a column a stage, and last the centred mean under `name`; 80 columns wide at most.

    The scores of each stage are those of the same tasks.
    """
    drawn = Table(title=f"{name}: % right ± standard error", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("task", "guess", *stages):
        drawn.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for line in zip(*stages.values(), strict=True):
        cells = (f"{100 * score.accuracy:.1f} ±{100 * score.standard_error:.1f}" for score in line)
        drawn.add_row(line[0].task.removeprefix("bigbench_"), f"{100 * line[0].baseline:.0f}", *cells)
    means = (f"{centred_mean(scores):.3f}±{centred_mean_error(scores):.3f}" for scores in stages.values())
    drawn.add_row(name, "0", *means, style="bold")
    return drawn
