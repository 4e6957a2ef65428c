"""Held-out bits per byte against tokens and seconds, for two training recipes.

./prepare.sh --vocab-size 8192 --num-shards 9
python -m benchmarks.learning --depth 4

A recipe is how to train: batch size, schedule, learning rates, optimizer, and whether logits are capped.
Both recipes start from the same weights and read the same text in the same order. They train in turn, one evaluation
interval each, so that other load on the machine affects both.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from nanochat import cli, paths
from nanochat.data.batches import StreamRows, rows_per_step, text_batches
from nanochat.data.token_files import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, fast_rows, software
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train_step
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import PretrainOptions, TrainOptions, check_range
from nanochat.train.run import TrainingRun
from nanochat.train.scaling import default_batch_size, lr_multiplier, matrix_lr_factor

EVAL_ROWS = 8


@dataclass
class Recipe:
    """How to train; the defaults are those of pretrain.sh."""

    total_batch_size: int | None = None
    """tokens per step; by default derived from --tokens"""
    warmup_ratio: float = PretrainOptions.warmup_ratio
    """share of the steps in which learning rates rise from 0"""
    warmdown_ratio: float = PretrainOptions.warmdown_ratio
    """share of the steps in which learning rates fall to 0"""
    short_rows_ratio: float = PretrainOptions.short_rows_ratio
    """share of the steps, at the start, with rows of a quarter of the context"""
    grad_clip: float = PretrainOptions.grad_clip
    """maximum global norm of the gradient; 0: no clipping"""
    float32: bool = False
    """compute in float32 even if the processor multiplies bfloat16"""
    final_lr_frac: float = PretrainOptions.final_lr_frac
    """final factor on the learning rates"""
    logit_softcap: float = 0.0
    """15: as in the architecture nanochat-1"""
    fp8: bool = False
    """FP8 matmuls inside the blocks; a CPU emulates them, so its seconds mean nothing"""
    newton_schulz: bool = False
    """Muon with its original polynomial, applied five times"""
    scale_lr: bool = True
    """scale Muon's learning rate with batch size and steps, as pretrain.sh does"""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def compute_dtype(self, runtime: Runtime) -> torch.dtype:
        return torch.float32 if self.float32 else runtime.compute_dtype


class NewtonSchulzMuon(MuonAdamW):
    """Muon with the polynomial of its first version."""

    polynomial = ((3.4445, -4.7750, 2.0315),) * 5


RECIPE_2025 = Recipe(
    total_batch_size=16_384,
    warmup_ratio=0.0,
    warmdown_ratio=0.2,
    short_rows_ratio=0.0,
    float32=True,
    newton_schulz=True,
    scale_lr=False,
    optimizer=OptimizerOptions(
        matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.0, adam_beta2=0.95
    ),
)
"""The recipe of the original nanochat."""


@dataclass
class BenchmarkOptions:
    """Train a model with a recipe and, for comparison, with a second one."""

    depth: int = 4
    max_seq_len: int = 512
    tokens: int = 3_276_800
    """training tokens"""
    seeds: tuple[int, ...] = (0,)
    """for weights and order of the text; figures are means over them"""
    dataset: str = "fineweb-edu"
    """text prepared by prepare.sh"""
    eval_tokens: int = 131_072
    """held-out tokens"""
    evaluations: int = 8
    """number of evaluations; their time is not counted"""
    device_batch_size: int | None = None
    """rows per forward pass; by default as in pretraining"""
    device_type: str = "auto"
    against: Literal["2025", "without-fp8", "nothing"] = "2025"
    """2025: the recipe of the original nanochat; without-fp8: this recipe without --fp8"""
    json: bool = False
    """print one JSON object"""
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name in ("depth", "tokens", "eval_tokens", "evaluations", "device_batch_size"):
            check_range(name, getattr(self, name), 1)


class Point(NamedTuple):
    """One evaluation during training."""

    tokens: int
    seconds: float
    """of training, without evaluations"""
    bits_per_byte: float


@dataclass(frozen=True)
class Text:
    """Rows of prepared text."""

    tokenizer: Tokenizer
    train: StreamRows
    held_out: StreamRows

    @classmethod
    def open(cls, dataset: str, sequence_len: int) -> "Text":
        """Raises UserError if the dataset is not prepared."""
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        train, held_out = (
            StreamRows(TokenShards.open(paths.tokens_dir(dataset), split, tokenizer), sequence_len, tokenizer.bos_id)
            for split in ("train", "val")
        )
        return cls(tokenizer, train, held_out)


class Training:
    """A model trained with one recipe. Initial weights depend on the seed alone."""

    def __init__(self, options: BenchmarkOptions, recipe: Recipe, text: Text, seed: int, runtime: Runtime) -> None:
        torch.manual_seed(seed)
        config = GPTConfig.from_depth(options.depth, text.tokenizer.vocab_size, options.max_seq_len)
        config = replace(config, logit_softcap=recipe.logit_softcap)
        with torch.device(runtime.device):
            self.model = GPT(config, recipe.compute_dtype(runtime))
        if recipe.fp8:
            self.model.train_in_fp8()
        self.text = text
        self.runtime = runtime
        self.schedule = TrainOptions(
            warmup_ratio=recipe.warmup_ratio,
            warmdown_ratio=recipe.warmdown_ratio,
            final_lr_frac=recipe.final_lr_frac,
            grad_clip=recipe.grad_clip,
        )
        self.total_batch_size = recipe.total_batch_size or default_batch_size(options.tokens, options.max_seq_len)
        self.num_iterations = max(1, options.tokens // self.total_batch_size)
        factor = matrix_lr_factor(self.total_batch_size, self.num_iterations) if recipe.scale_lr else 1.0
        rates = replace(recipe.optimizer, matrix_lr=factor * recipe.optimizer.matrix_lr)
        optimizer = (NewtonSchulzMuon if recipe.newton_schulz else MuonAdamW)(self.model, rates)
        self.run = TrainingRun("base", "benchmark", self.schedule, runtime, "", self.model, optimizer)
        self.batches = text_batches(
            text.train,
            recipe.short_rows_ratio,
            self.num_iterations,
            rows_per_step=rows_per_step(self.total_batch_size, options.max_seq_len, runtime.world),
            device_batch_size=options.device_batch_size
            or fast_rows(options.max_seq_len, runtime.device, self.model.compute_dtype),
            world=runtime.world,
            seed=seed,
        )
        self.step = 0
        self.seconds = 0.0

    def train(self, until: int) -> None:
        """Train up to step `until`."""
        start = time.perf_counter()
        while self.step < until:
            lr_scale = lr_multiplier(self.step, self.num_iterations, self.schedule)
            train_step(self.run, self.batches.step_data(self.step).batches, lr_scale)
            self.step += 1
        self.seconds += time.perf_counter() - start

    def evaluate(self, num_tokens: int) -> Point:
        """Measure bits per byte on the first `num_tokens` held-out tokens."""
        bpb = bits_per_byte(self.model, self.text.tokenizer, self.text.held_out, EVAL_ROWS, num_tokens, self.runtime)
        return Point(self.step * self.total_batch_size, self.seconds, bpb)


def main(options: BenchmarkOptions) -> None:
    recipes = {"this recipe": options.recipe}
    if options.against == "2025":
        recipes["2025"] = RECIPE_2025
    elif options.against == "without-fp8":
        recipes["without FP8"] = replace(options.recipe, fp8=False)
    with Runtime.start(options.device_type) as runtime:
        text = Text.open(options.dataset, options.max_seq_len)
        dtypes = {name: str(recipe.compute_dtype(runtime)) for name, recipe in recipes.items()}
        curves: dict[str, list[list[Point]]] = {name: [[] for _ in options.seeds] for name in recipes}
        for number, seed in enumerate(options.seeds):
            trainings = {name: Training(options, recipe, text, seed, runtime) for name, recipe in recipes.items()}
            for evaluation in range(1, options.evaluations + 1):
                for name, training in trainings.items():
                    training.train(training.num_iterations * evaluation // options.evaluations)
                    point = training.evaluate(options.eval_tokens)
                    curves[name][number].append(point)
                    print(f"seed {seed}, {name}: {describe(point)}", file=sys.stderr, flush=True)
        if options.json:
            about = {"machine": runtime.describe(), "software": software(), "dtypes": dtypes}
            print(json.dumps({**about, "curves": curves}))
        else:
            print(f"{runtime.describe()}; {software()}; {dtypes}; {asdict(options)}")
            print(table({name: mean_curve(seeds) for name, seeds in curves.items()}))


def mean_curve(curves: list[list[Point]]) -> list[Point]:
    """Average the curves of several seeds, point by point."""
    return [
        Point(*(statistics.mean(values) for values in zip(*points, strict=True)))
        for points in zip(*curves, strict=True)
    ]


def describe(point: Point) -> str:
    return f"{point.tokens:,} tokens, {point.seconds:,.0f} s, {point.bits_per_byte:.4f} bits/byte"


def table(curves: dict[str, list[Point]]) -> str:
    """Format curves as a Markdown table: one row per evaluation, two columns per recipe."""
    ours, *others = curves.values()
    head = ["tokens", *(f"{name}, {unit}" for name in curves for unit in ("s", "bits/byte"))]
    lines = [head + ["lower by"] * len(others), ["---"] * (len(head) + len(others))]
    for point, *rest in zip(ours, *others, strict=True):
        cells = [f"{point.tokens:,.0f}"]
        for each in (point, *rest):
            cells += [f"{each.seconds:,.0f}", f"{each.bits_per_byte:.4f}"]
        lines.append(cells + [f"{other.bits_per_byte - point.bits_per_byte:.4f}" for other in rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
