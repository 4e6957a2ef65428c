"""How fast a recipe learns: held-out bits per byte against tokens and seconds, beside another recipe.

./prepare.sh --vocab-size 8192 --num-shards 9
python -m benchmarks.learning --depth 4

A recipe is what may change while the model stays loadable elsewhere: batch size, schedule, learning rates, optimizer.
Both start from the same weights and read the same text in the same order. They train by turns, from one evaluation to
the next, so that whatever else the machine does falls on both.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from benchmarks.training import Text, Training
from nanochat import cli
from nanochat.data.batches import rows_per_step
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, fast_rows, software
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import PretrainOptions, TrainOptions, check_range
from nanochat.train.scaling import default_batch_size


@dataclass
class Recipe:
    """How to train. What is not given is what pretrain.sh does."""

    total_batch_size: int | None = None
    """tokens in a step; by default it follows from --tokens"""
    warmup_ratio: float = PretrainOptions.warmup_ratio
    """share of the steps in which learning rates rise from 0"""
    warmdown_ratio: float = PretrainOptions.warmdown_ratio
    """share of the steps in which they fall to 0"""
    short_rows_ratio: float = PretrainOptions.short_rows_ratio
    """share of the steps, the first ones, whose rows are a quarter of the context"""
    grad_clip: float = PretrainOptions.grad_clip
    """largest global norm of the gradient; 0: no clipping"""
    float32: bool = False
    """compute in float32 also where the processor multiplies bfloat16"""
    fp8: bool = False
    """the matrices inside the blocks multiply in FP8; a CPU emulates it: its seconds mean nothing"""
    newton_schulz: bool = False
    """Muon with its first polynomial, the same five times"""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def compute_dtype(self, runtime: Runtime) -> torch.dtype:
        """What the activations have."""
        return torch.float32 if self.float32 else runtime.compute_dtype


class NewtonSchulzMuon(MuonAdamW):
    """Muon as it was first."""

    polynomial = ((3.4445, -4.7750, 2.0315),) * 5


RECIPE_2025 = Recipe(
    total_batch_size=16_384,
    warmup_ratio=0.0,
    warmdown_ratio=0.2,
    short_rows_ratio=0.0,
    float32=True,
    newton_schulz=True,
    optimizer=OptimizerOptions(
        matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.0, adam_beta2=0.95
    ),
)
"""nanochat's first."""


@dataclass
class BenchmarkOptions:
    """Train a model by a recipe, and by another beside it."""

    depth: int = 4
    max_seq_len: int = 512
    tokens: int = 3_276_800
    """to train on"""
    seeds: tuple[int, ...] = (0,)
    """of weights and order; the figures are means over them"""
    dataset: str = "fineweb-edu"
    """text prepared by prepare.sh"""
    eval_tokens: int = 131_072
    """of held-out text"""
    evaluations: int = 8
    """spread over the training; its seconds leave them out"""
    device_batch_size: int | None = None
    """rows in one forward pass; by default as pretraining takes them"""
    device_type: str = "auto"
    against: Literal["2025", "without-fp8", "nothing"] = "2025"
    """the recipe of 2025; this one but for --fp8"""
    json: bool = False
    """print one object"""
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name in ("depth", "tokens", "eval_tokens", "evaluations", "device_batch_size"):
            check_range(name, getattr(self, name), 1)


class Point(NamedTuple):
    """How far a training is."""

    tokens: int
    seconds: float
    """in training, without evaluations"""
    bits_per_byte: float


def prepare(options: BenchmarkOptions, recipe: Recipe, text: Text, seed: int, runtime: Runtime) -> Training[GPT]:
    """A training that has not begun; the weights of a seed are the same for every recipe."""
    torch.manual_seed(seed)
    config = GPTConfig.from_depth(options.depth, text.tokenizer.vocab_size, options.max_seq_len)
    with torch.device(runtime.device):
        model = GPT(config, recipe.compute_dtype(runtime))
    if recipe.fp8:
        model.train_in_fp8()
    total_batch_size = recipe.total_batch_size or default_batch_size(options.tokens, options.max_seq_len)
    rows_per_step(total_batch_size, options.max_seq_len, runtime.world)
    return Training(
        model,
        (NewtonSchulzMuon if recipe.newton_schulz else MuonAdamW)(model, recipe.optimizer),
        text,
        TrainOptions(
            warmup_ratio=recipe.warmup_ratio, warmdown_ratio=recipe.warmdown_ratio, grad_clip=recipe.grad_clip
        ),
        total_batch_size=total_batch_size,
        num_iterations=max(1, options.tokens // total_batch_size),
        device_batch_size=options.device_batch_size
        or fast_rows(options.max_seq_len, runtime.device, model.compute_dtype),
        seed=seed,
        runtime=runtime,
        short_rows_ratio=recipe.short_rows_ratio,
    )


def point(training: Training[GPT], eval_tokens: int) -> Point:
    """Where a training is."""
    tokens = training.optimizer.steps * training.total_batch_size
    return Point(tokens, training.seconds, training.bpb(eval_tokens))


def main(options: BenchmarkOptions) -> None:
    recipes = {"this recipe": options.recipe}
    if options.against == "2025":
        recipes["2025"] = RECIPE_2025
    elif options.against == "without-fp8":
        recipes["without FP8"] = replace(options.recipe, fp8=False)
    with Runtime.start(options.device_type) as runtime:
        text = Text.open(options.dataset, options.max_seq_len)
        dtypes = {name: str(recipe.compute_dtype(runtime)) for name, recipe in recipes.items()}
        curves: dict[str, list[list[Point]]] = {name: [] for name in recipes}
        for seed in options.seeds:
            trainings = {name: prepare(options, recipe, text, seed, runtime) for name, recipe in recipes.items()}
            for curve in curves.values():
                curve.append([])
            for evaluation in range(1, options.evaluations + 1):
                for name, training in trainings.items():
                    training.train(training.num_iterations * evaluation // options.evaluations)
                    curves[name][-1].append(point(training, options.eval_tokens))
                    print(f"seed {seed}, {name}: {describe(curves[name][-1][-1])}", file=sys.stderr, flush=True)
        means = {name: mean_curve(list(seeds)) for name, seeds in curves.items()}
        if options.json:
            known = {"machine": runtime.describe(), "software": software(), "dtypes": dtypes}
            print(json.dumps({**known, "curves": curves}))
        else:
            print(f"{runtime.describe()}; {software()}; {dtypes}; {asdict(options)}")
            print(table(means))


def mean_curve(seeds: list[list[Point]]) -> list[Point]:
    """Point by point over seeds."""
    return [
        Point(*(statistics.mean(values) for values in zip(*points, strict=True))) for points in zip(*seeds, strict=True)
    ]


def describe(point: Point) -> str:
    """For a person."""
    return f"{point.tokens:,} tokens, {point.seconds:,.0f} s, {point.bits_per_byte:.4f} bits/byte"


def table(means: dict[str, list[Point]]) -> str:
    """Markdown: a line an evaluation, two columns a recipe."""
    ours, *others = means.values()
    head = ["tokens", *(f"{name}, {unit}" for name in means for unit in ("s", "bits/byte"))]
    lines = [head + ["lower by"] * len(others), ["---"] * (len(head) + len(others))]
    for point, *rest in zip(ours, *others, strict=True):
        cells = [f"{point.tokens:,.0f}"]
        for each in (point, *rest):
            cells += [f"{each.seconds:,.0f}", f"{each.bits_per_byte:.4f}"]
        lines.append(cells + [f"{other.bits_per_byte - point.bits_per_byte:.4f}" for other in rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
