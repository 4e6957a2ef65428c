"""The report's plots. Each stage is a column and has its own color."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from nanochat.eval.results import TaskScore
from nanochat.report.history import Stage
from nanochat.stages import STAGES

COLORS = dict(zip(STAGES, cycle(("#4477aa", "#228833", "#cc7700", "#aa3377")), strict=False))
"""Distinguishable by color-blind readers (after Paul Tol's bright scheme)."""
STYLE = Path(__file__).with_suffix(".mplstyle")
SMOOTHING_WINDOW = 0.05  # window of the moving average, as a fraction of the curve
MAX_POINTS = 1500
"""Maximum points per curve, more than a plot's width in pixels; longer curves are averaged."""


@dataclass(frozen=True)
class Metric:
    key: str  # in metrics.jsonl
    title: str
    unit: str
    sources: tuple[str, ...] = tuple(STAGES)
    log: bool = False
    percent: bool = False
    from_zero: bool = True
    smooth: bool = True


CURVES: dict[str, tuple[Metric, ...]] = {  # by file name
    "loss": (  # not for RL, whose loss has no meaningful scale
        Metric("loss", "Training loss", "nats per token", tuple(name for name in STAGES if name != "rl"), log=True),
    ),
    "bits-per-byte": (Metric("bpb", "Held-out text", "bits per byte", from_zero=False, smooth=False),),
    "reward": (
        Metric("reward", "Reward", "share of correct replies", ("rl",), percent=True),
        Metric("reply_tokens", "Reply length", "tokens", ("rl",)),
        Metric("useful_share", "Replies with a gradient", "share of replies", ("rl",), percent=True),
    ),
    "optimizer": (
        Metric("lr_scale", "Learning rate", "multiplier", smooth=False),
        Metric("gradient_norm", "Gradient norm", "before clipping", log=True),
    ),
    "speed": (
        Metric("tokens_per_second", "Throughput", "tokens per second"),
        Metric("mfu", "Model FLOPs utilization", "share of peak", percent=True),
    ),
}


def draw_curves(stages: Sequence[Stage], metrics: Sequence[Metric]) -> Figure | None:
    """Plot metrics over steps, one row per metric and one column per stage. None without data."""
    rows = [
        [(metric, stage) for stage in stages if stage.source in metric.sources and stage.series(metric.key)[0]]
        for metric in metrics
    ]
    rows = [row for row in rows if row]
    if not rows:
        return None
    if all(len(row) == 1 for row in rows):
        rows = [[row[0] for row in rows]]
    columns = max(map(len, rows))
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(max(6.5, 3.3 * columns), 2.8 * len(rows)), layout="constrained")
        for panels, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            for axes, (metric, stage) in zip(panels, row, strict=False):
                _draw_panel(axes, stage, metric)
            for axes in panels[len(row) :]:
                axes.set_axis_off()
    return figure


def _draw_panel(axes: Axes, stage: Stage, metric: Metric) -> None:
    steps, values = downsample(*stage.series(metric.key))
    color = COLORS[stage.source]
    axes.set_title(f"{metric.title}, {stage.label}", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(metric.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if metric.smooth and len(values) >= 20:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=color, linewidth=1.8)
    else:
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if len(values) < 20 else None, markersize=4)
    if metric.log and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif metric.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if values.max() > 0.05 else 1))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if metric.from_zero and not metric.log:
        axes.set_ylim(0, 1.08 * values.max() or 1)


def downsample(
    steps: Sequence[int], values: Sequence[float], max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Average groups of adjacent points. (N,), (N,) -> (M,), (M,) with M <= max_points"""
    together = -(-len(steps) // max_points)
    starts = range(0, len(steps), together)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centered moving average, without lag; the window shrinks at the ends. (N,) -> (N,)"""
    window = np.ones(2 * max(1, round(len(values) * SMOOTHING_WINDOW / 2)) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_scores(title: str, by_stage: Mapping[str, Sequence[TaskScore]]) -> Figure:
    """Plot one line per task: a dot with its standard error per stage, and a mark at the accuracy of guessing."""
    tasks = [score.task for score in next(iter(by_stage.values()))]
    baselines = [score.baseline for score in next(iter(by_stage.values()))]
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(8, 1.4 + 0.42 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        lines = np.arange(len(tasks))
        if any(baselines):
            axes.scatter(baselines, lines, marker="|", s=160, color="#888888", label="guessing")
        for index, (source, scores) in enumerate(by_stage.items()):
            # Offset the stages vertically, so that equal scores do not overlap.
            height = 0.17 * (index - (len(by_stage) - 1) / 2)
            axes.errorbar(
                [score.accuracy for score in scores], lines + height, xerr=[score.standard_error for score in scores],
                fmt="o", markersize=5, capsize=3, color=COLORS[source.split()[0]], label=source,
            )  # fmt: skip
        axes.set_yticks(lines, [task.removeprefix("bigbench_").replace("_", " ") for task in tasks])
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("accuracy with standard error")
        axes.set_title(title, loc="left")
        figure.legend(loc="outside right upper")
    return figure
