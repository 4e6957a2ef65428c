"""The report's plots. One figure a question; a stage is a column, and always has the same colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from nanochat.eval.results import TaskScore
from nanochat.report.history import Stage

COLOURS = {"base": "#4477aa", "mid": "#228833", "sft": "#cc7700", "rl": "#aa3377"}
"""Told apart by colour-blind readers too (after Paul Tol's bright scheme)."""
STYLE = Path(__file__).with_suffix(".mplstyle")
SMOOTHED_SHARE = 0.05
"""of a run's points, in the window of the moving average"""
MOST_POINTS = 1500
"""of a curve, more than a plot has pixels across; longer ones are averaged"""


@dataclass(frozen=True)
class Quantity:
    """Something logged at each step, and how to draw it."""

    key: str
    """in metrics.jsonl"""
    title: str
    unit: str
    sources: tuple[str, ...] = ("base", "mid", "sft", "rl")
    log: bool = False
    percent: bool = False
    from_zero: bool = True
    smooth: bool = True


# The loss of RL is left out: its height means nothing.
LOSS = Quantity("loss", "Training loss", "nats per token", ("base", "mid", "sft"), log=True)
BITS_PER_BYTE = Quantity("bpb", "Held-out text", "bits per byte", from_zero=False, smooth=False)
LEARNING_RATE = Quantity("lr_scale", "Learning rate", "times the full rates", smooth=False)
GRADIENT_NORM = Quantity("gradient_norm", "Gradient norm", "before clipping", log=True)
THROUGHPUT = Quantity("tokens_per_second", "Throughput", "tokens per second")
MFU = Quantity("mfu", "Model FLOPs utilisation", "share of the peak", percent=True)
REWARD = Quantity("reward", "Reward", "share of replies that are right", ("rl",), percent=True)
LENGTH = Quantity("reply_tokens", "Reply length", "tokens", ("rl",))
TAUGHT = Quantity("taught_share", "Replies that taught", "share of replies", ("rl",), percent=True)

CURVES: dict[str, tuple[Quantity, ...]] = {
    "loss": (LOSS,),
    "bits-per-byte": (BITS_PER_BYTE,),
    "reward": (REWARD, LENGTH, TAUGHT),
    "optimizer": (LEARNING_RATE, GRADIENT_NORM),
    "speed": (THROUGHPUT, MFU),
}
"""File name, and what is in it."""


def draw_curves(stages: Sequence[Stage], quantities: Sequence[Quantity]) -> Figure | None:
    """Quantities over steps, a row each and a column a stage; of one stage alone, side by side. None without data."""
    rows = [
        [(quantity, stage) for stage in stages if stage.source in quantity.sources and stage.series(quantity.key)[0]]
        for quantity in quantities
    ]
    rows = [row for row in rows if row]
    if not rows:
        return None
    if all(len(row) == 1 for row in rows):
        rows = [[row[0] for row in rows]]
    columns = max(map(len, rows))
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(max(6.5, 3.3 * columns), 2.8 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for panels, row in zip(grid, rows, strict=True):
            for axes in panels[len(row) :]:
                axes.set_axis_off()
            for axes, (quantity, stage) in zip(panels, row, strict=False):
                _draw_panel(axes, stage, quantity)
    return figure


def _draw_panel(axes: Axes, stage: Stage, quantity: Quantity) -> None:
    steps, values = thinned(*stage.series(quantity.key))
    colour = COLOURS[stage.source]
    axes.set_title(f"{quantity.title}, {stage.source}", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(quantity.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if quantity.smooth and len(values) >= 20:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=colour, linewidth=1.8)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(values) < 20 else None, markersize=4)
    if quantity.log and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif quantity.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if values.max() > 0.05 else 1))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if quantity.from_zero and not quantity.log:
        axes.set_ylim(0, 1.08 * values.max() or 1)


def thinned(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of as many neighbouring points as leave `most` or fewer. (N,), (N,) -> (M,), (M,) with M <= most"""
    together = -(-len(steps) // most)
    starts = range(0, len(steps), together)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred moving average, which does not lag behind; at the ends over what there is. (N,) -> (N,)"""
    window = np.ones(2 * max(1, round(len(values) * SMOOTHED_SHARE / 2)) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_scores(title: str, by_stage: Mapping[str, Sequence[TaskScore]]) -> Figure:
    """A line for each task, on it a dot with its standard error for each stage, and a mark where guessing is."""
    tasks = [score.task for score in next(iter(by_stage.values()))]
    baselines = [score.baseline for score in next(iter(by_stage.values()))]
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(8, 1.4 + 0.42 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        lines = np.arange(len(tasks))
        if any(baselines):
            axes.scatter(baselines, lines, marker="|", s=160, color="#888888", label="guessing")
        for index, (source, scores) in enumerate(by_stage.items()):
            # Stages stand a little above each other, so that equal scores do not hide one another.
            height = 0.17 * (index - (len(by_stage) - 1) / 2)
            axes.errorbar(
                [score.accuracy for score in scores], lines + height, xerr=[score.standard_error for score in scores],
                fmt="o", markersize=5, capsize=3, color=COLOURS[source], label=source,
            )  # fmt: skip
        axes.set_yticks(lines, [task.removeprefix("bigbench_").replace("_", " ") for task in tasks])
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("right, with the standard error")
        axes.set_title(title, loc="left")
        figure.legend(loc="outside right upper")
    return figure
