"""Loss against training compute, and how much compute one recipe saves over another.

./prepare.sh --vocab-size 8192 --num-shards 9
python -m benchmarks.scaling_laws --name before --budgets 3e12 1e13 3e13 --depths 2 3 4 --seeds 0 1
python -m benchmarks.scaling_laws --name after --warmdown-ratio 0.65 --budgets 3e12 1e13 3e13 --depths 2 3 4 \
    --seeds 0 1 --against before

Each budget (FLOPs) trains one model per depth and seed, on as many tokens as the budget allows. The lowest loss at a
budget and its ratio of tokens to parameters come from a parabola in log(ratio), approach 2 of Chinchilla
(https://arxiv.org/abs/2203.15556). A power law E + A C^-a through the lowest losses gives the compute multiplier at a
budget C: C'/C, where C' is the compute with which the other recipe reaches the same loss. Intervals are from a
parametric bootstrap with the standard deviation between seeds.

A run is one line of a JSON Lines file and is not repeated. A recipe includes the code it ran with: give it a new name
after changing the code.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.learning import BenchmarkOptions, Recipe, Text, Training
from nanochat import cli
from nanochat.errors import UserError
from nanochat.model.gpt import GPTConfig
from nanochat.report.plots import COLORS, STYLE
from nanochat.runtime import Runtime, commit, software
from nanochat.spark.plan import flops_per_token
from nanochat.train.options import check_range

NUM_SAMPLES = 1000  # of the bootstrap
PERCENTILES = (5, 95)


@dataclass
class LawOptions:
    """Train what is missing from the grid, then print laws and compute multipliers of all recipes in the file."""

    name: str = "default"
    """name of the recipe to train"""
    recipe: Recipe = field(default_factory=Recipe)
    budgets: tuple[float, ...] = ()
    """training compute in FLOPs; none: only print"""
    depths: tuple[int, ...] = (2, 3, 4)
    seeds: tuple[int, ...] = (0,)
    against: str | None = None
    """recipe to compare with"""
    max_seq_len: int = 512
    dataset: str = "fineweb-edu"
    """text prepared by prepare.sh"""
    eval_tokens: int = 65_536
    """held-out tokens"""
    file: Path = Path("benchmarks/results/scaling_laws.jsonl")
    """one line per run"""
    plot: Path | None = None
    """picture to draw: losses and laws of all recipes in the file"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "eval_tokens"):
            check_range(name, getattr(self, name), 1)
        for budget in self.budgets:
            check_range("budgets", budget, 1e9)
        for depth in self.depths:
            check_range("depths", depth, 1)


class Run(NamedTuple):
    """One trained model."""

    recipe: str
    budget: float  # FLOPs
    depth: int
    seed: int
    dataset: str
    max_seq_len: int
    eval_tokens: int
    tokens: int  # trained on
    parameters: int  # of the matrices and the head
    bits_per_byte: float

    @property
    def key(self) -> tuple[object, ...]:
        """Runs with the same key are not repeated."""
        return self[:7]


class Law(NamedTuple):
    """L(C) = E + A C^-a, in bits per byte, and the best ratio of tokens to parameters at each budget."""

    floor: float  # E
    scale: float  # A
    exponent: float  # a
    losses: Mapping[float, float]  # lowest loss by budget
    ratios: Mapping[float, float]

    def loss(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.exponent

    def compute(self, loss: float) -> float:
        """The compute at which the law reaches `loss`; infinite at or below its floor."""
        return (self.scale / (loss - self.floor)) ** (1 / self.exponent) if loss > self.floor else math.inf


def train(options: LawOptions, text: Text, runtime: Runtime, budget: float, depth: int, seed: int) -> Run:
    """Train one model and measure it on held-out text."""
    config = GPTConfig.from_depth(depth, text.tokenizer.vocab_size, options.max_seq_len)
    tokens = int(budget / flops_per_token(config, options.recipe.short_rows_ratio))
    training = Training(
        BenchmarkOptions(depth=depth, max_seq_len=options.max_seq_len, tokens=tokens),
        options.recipe,
        text,
        seed,
        runtime,
    )
    training.train(training.num_iterations)
    point = training.evaluate(options.eval_tokens)
    where = (options.dataset, options.max_seq_len, options.eval_tokens)
    return Run(options.name, budget, depth, seed, *where, point.tokens, config.num_multiplied, point.bits_per_byte)


def read_runs(file: Path) -> list[Run]:
    """Runs recorded so far. Raises UserError if the file is not one of this benchmark's."""
    if not file.exists():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [Run(**{name: line[name] for name in Run._fields}) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not have one run per line: choose another --file") from None


class Cell(NamedTuple):
    """Runs of one recipe, budget and depth that differ in their seed."""

    loss: float  # bits per byte, mean over the seeds
    ratio: float  # tokens per parameter
    num_seeds: int


Grid = Mapping[tuple[float, int], Cell]  # by budget and depth


def grids(runs: Iterable[Run]) -> tuple[dict[str, Grid], float]:
    """Average over seeds. Returns a grid per recipe, and the standard deviation between seeds (NaN: one seed each)."""
    groups: dict[str, dict[tuple[float, int], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run.recipe][run.budget, run.depth].append(run)
    result: dict[str, Grid] = {}
    squares, freedom = 0.0, 0
    for name, cells in groups.items():
        grid = {}
        for key, seeds in cells.items():
            losses = np.array([run.bits_per_byte for run in seeds])
            grid[key] = Cell(float(losses.mean()), seeds[0].tokens / seeds[0].parameters, len(seeds))
            squares += float(np.square(losses - losses.mean()).sum())
            freedom += len(seeds) - 1
        result[name] = grid
    return result, math.sqrt(squares / freedom) if freedom else math.nan


def fit(grid: Grid) -> Law:
    """Fit the law of one recipe. With fewer than three budgets the floor is 0."""
    lowest: dict[float, float] = {}
    best: dict[float, float] = {}
    for budget in sorted({budget for budget, _ in grid}):
        points = sorted((math.log(cell.ratio), cell.loss) for key, cell in grid.items() if key[0] == budget)
        loss, x = min((loss, x) for x, loss in points)
        if len(points) >= 3:
            curve = np.poly1d(np.polyfit([x for x, _ in points], [loss for _, loss in points], 2))
            if curve.coef[0] > 0:
                x = float(np.clip(-curve.coef[1] / (2 * curve.coef[0]), points[0][0], points[-1][0]))
                loss = float(curve(x))
        lowest[budget], best[budget] = loss, math.exp(x)
    if len(lowest) == 1:
        return Law(0.0, loss, 0.0, lowest, best)
    log_compute, losses = np.log(list(lowest)), np.array(list(lowest.values()))
    floors = np.linspace(0, 0.98 * losses.min(), 200) if len(lowest) > 2 else np.zeros(1)
    y = np.log(losses - floors[:, None])  # one line per candidate floor
    centered = log_compute - log_compute.mean()
    slopes = y @ centered / (centered @ centered)
    intercepts = y.mean(axis=1) - slopes * log_compute.mean()
    errors = floors[:, None] + np.exp(intercepts[:, None] + slopes[:, None] * log_compute) - losses
    i = int(np.square(errors).sum(axis=1).argmin())
    return Law(float(floors[i]), math.exp(intercepts[i]), -float(slopes[i]), lowest, best)


def multipliers(ours: Grid, theirs: Grid) -> dict[float, float]:
    """Compute that the recipe of `theirs` needs for the loss of `ours`, over that of `ours`, by budget."""
    law = fit(theirs)
    return {budget: law.compute(loss) / budget for budget, loss in fit(ours).losses.items()}


def interval(ours: Grid, theirs: Grid, sigma: float) -> dict[float, tuple[float, float]]:
    """Percentiles of `multipliers` under noise of standard deviation `sigma` per run."""
    generator = np.random.default_rng(0)

    def noisy(grid: Grid) -> Grid:
        return {
            key: cell._replace(loss=cell.loss + generator.normal(0, sigma / math.sqrt(cell.num_seeds)))
            for key, cell in grid.items()
        }

    samples = [multipliers(noisy(ours), noisy(theirs)) for _ in range(NUM_SAMPLES)]
    values = {budget: np.percentile([sample[budget] for sample in samples], PERCENTILES) for budget in samples[0]}
    return {budget: (float(low), float(high)) for budget, (low, high) in values.items()}


def describe(runs: Iterable[Run], against: str | None) -> str:
    """Format the lowest loss, best ratio and compute multiplier of each recipe at each budget as Markdown."""
    by_recipe, sigma = grids(runs)
    if against and against not in by_recipe:
        raise UserError(f"--against must be one of {', '.join(by_recipe)}, got {against}")
    lines = [["recipe", "FLOPs", "bits/byte", "tokens per parameter", f"compute multiplier over {against}"]]
    lines.append(["---"] * 5)
    laws = []
    for name, grid in by_recipe.items():
        law = fit(grid)
        laws.append(f"{name}: {law.floor:.3f} + {law.scale:.4g} C^-{law.exponent:.4f}{held_back(grid)}")
        factors = multipliers(grid, by_recipe[against]) if against else {}
        ranges = interval(grid, by_recipe[against], sigma) if against and not math.isnan(sigma) else {}
        for budget, loss in law.losses.items():
            factor = f"{factors[budget]:.2f}" if against else ""
            if budget in ranges:
                factor += " ({:.2f} to {:.2f})".format(*ranges[budget])
            lines.append([name, f"{budget:.3g}", f"{loss:.4f}", f"{law.ratios[budget]:.1f}", factor])
    table = "\n".join(f"| {' | '.join(line[: None if against else -1])} |" for line in lines)
    return "\n".join([table, "", f"standard deviation between seeds: {sigma:.4f}", *laws])


def held_back(grid: Grid) -> str:
    """How well the law of the smaller budgets predicts the lowest loss at the largest; "" with fewer than 3 budgets."""
    largest = max(budget for budget, _ in grid)
    smaller = {key: cell for key, cell in grid.items() if key[0] < largest}
    if len({budget for budget, _ in smaller}) < 2:
        return ""
    found, predicted = fit(grid).losses[largest], fit(smaller).loss(largest)
    return f"; without {largest:.3g} FLOPs it predicts {predicted:.4f} there ({predicted / found - 1:+.2%})"


def draw(runs: Iterable[Run], file: Path) -> None:
    """Plot every mean over seeds, the lowest loss of each budget, and the laws, one color per recipe."""
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, grid), color in zip(grids(runs)[0].items(), cycle(COLORS.values()), strict=False):
            law = fit(grid)
            budgets = np.geomspace(min(law.losses), max(law.losses), 50)
            axes.plot(budgets, [law.loss(budget) for budget in budgets], color=color, label=name)
            axes.plot(*zip(*law.losses.items(), strict=True), "o", color=color)
            tried = [(budget, cell.loss) for (budget, _), cell in grid.items()]
            axes.plot(*zip(*tried, strict=True), "o", color=color, alpha=0.3, markersize=4)
        axes.set(xscale="log", xlabel="training compute in FLOPs", ylabel="bits per byte of held-out text")
        axes.set_title("Loss and compute: all depths (pale), the best depth, and the law", loc="left")
        axes.legend()
        figure.savefig(file, dpi=150)


def main(options: LawOptions) -> None:
    runs = read_runs(options.file)
    recorded = {run.key for run in runs}
    grid = product(options.budgets, options.depths, options.seeds)
    where = (options.dataset, options.max_seq_len, options.eval_tokens)
    missing = [key for key in grid if (options.name, *key, *where) not in recorded]
    if missing:
        with Runtime.start(options.device_type) as runtime:
            text = Text.open(options.dataset, options.max_seq_len)
            about = {"machine": runtime.describe(), "software": software(), "commit": commit()}
            for key in missing:
                run = train(options, text, runtime, *key)
                line = {**run._asdict(), "options": asdict(options.recipe), "date": str(date.today()), **about}
                with options.file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{run.recipe} {run.budget:.3g} FLOPs d{run.depth} seed {run.seed}: {run.tokens:,} tokens, "
                    f"{run.bits_per_byte:.4f} bits/byte",
                    file=sys.stderr,
                    flush=True,
                )
                runs.append(run)
    print(describe(runs, options.against))
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    cli.run(main, LawOptions)
