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


def centred_mean(scores: Sequence[TaskScore]) -> float:
    """The mean of the centred scores: CORE, ChatCORE."""
    return sum(score.centred for score in scores) / len(scores)


def centred_mean_error(scores: Sequence[TaskScore]) -> float:
    """The standard error of `centred_mean`: the tasks' own, which are independent, in quadrature."""
    return math.hypot(*(score.standard_error / (1 - score.baseline) for score in scores)) / len(scores)


def score_table(title: str, name: str, scores: Sequence[TaskScore]) -> Table:
    """A line a task and, last, their centred mean under `name`; 80 columns wide at most."""
    drawn = Table(title=title)
    for heading in ("task", "problems", "right", "guessing", "centred"):
        drawn.add_column(heading, justify="left" if heading == "task" else "right")
    for score in scores:
        right = f"{score.accuracy:.1%} ± {score.standard_error:.1%}"
        drawn.add_row(score.task, f"{score.problems:,}", right, f"{score.baseline:.1%}", f"{score.centred:.3f}")
    drawn.add_section()
    total = f"{sum(score.problems for score in scores):,}"
    drawn.add_row(name, total, "", "", f"{centred_mean(scores):.4f} ± {centred_mean_error(scores):.4f}")
    return drawn
