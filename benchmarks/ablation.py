"""What each addition to the architecture is worth: bits per byte at equal tokens and at equal seconds, beside its cost.

./prepare.sh --vocab-size 8192 --num-shards 9
python -m benchmarks.ablation --depth 4

Every variant (benchmarks/architectures.py) first tunes its learning rates on a seed and a length of their own: all of
them by one factor, then by another those of what it added. With the best it trains once for each seed on `--tokens`
tokens, and once more on as many as fit into the seconds that the plain model takes for those, its warm-down included.
The seconds are those of a step, measured in turns before anything is trained, so that other work does not decide.

Each finished run is a line of `--results`. Interrupted, the same command goes on where it was; two at once with
different `--variants` and the same file share the work of two cores. `--table` only prints what is there.
"""

import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.ablation_results import PLAIN, Cost, Job, Results, Setting, table
from benchmarks.architectures import VARIANTS, AblationGPT, AblationOptimizer, DecodeCache, extra_parameters
from benchmarks.training import Text, Training
from nanochat import cli
from nanochat.data.batches import rows_per_step
from nanochat.errors import UserError
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime, software
from nanochat.train.options import TrainOptions, check_range

TUNING_SEED = 1_000_003
"""not one of those that are reported, or what was tried most often would look best"""
COST_ROUNDS = 5
"""times that each variant's step and decoding are timed"""
DECODE_TOKENS = 64
"""timed each time"""


@dataclass
class AblationOptions:
    """Train variants of the architecture and print the table."""

    depth: int = 4
    max_seq_len: int = 512
    tokens: int = 819_200
    """to train on"""
    tuning_tokens: int = 409_600
    """the same while learning rates are tuned"""
    total_batch_size: int = 4096
    """tokens a step"""
    device_batch_size: int = 8
    eval_tokens: int = 262_144
    """held-out, to measure on"""
    dataset: str = "fineweb-edu"
    seeds: tuple[int, ...] = (0, 1)
    lr_scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    """factors of all learning rates to try"""
    extra_lr_scales: tuple[float, ...] = (0.3, 1.0, 3.0)
    """factors, on top, of the learning rates of what a variant added"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    results: Path = Path("ablation.jsonl")
    """finished runs, a line each; depths may share a file"""
    table: bool = False
    """train nothing"""
    threads: int = 0
    """of the CPU; 0: as torch chooses"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        if unknown := set(self.variants) - set(VARIANTS):
            raise UserError(f"there is no variant {min(unknown)}: --variants takes {', '.join(VARIANTS)}")
        for name in ("seeds", "lr_scales", "extra_lr_scales", "variants"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} needs at least one value")
        for name in ("device_batch_size", "eval_tokens"):
            check_range(name, getattr(self, name), 1)
        for name in ("tokens", "tuning_tokens"):
            check_range(name, getattr(self, name), self.total_batch_size)


class Ablation:
    """Trains what the table needs and the file has not."""

    def __init__(self, options: AblationOptions, results: Results, runtime: Runtime) -> None:
        rows_per_step(options.total_batch_size, options.max_seq_len, runtime.world)
        self.options = options
        self.results = results
        self.runtime = runtime
        self.text = Text.open(options.dataset, options.max_seq_len)
        self.config = GPTConfig.from_depth(options.depth, self.text.tokenizer.vocab_size, options.max_seq_len)

    def run(self) -> None:
        """Cost first, then each variant: tune, and train with the best."""
        with self.results.alone():
            if set(VARIANTS) - set(self.results.costs()):
                self.measure_costs()
        for variant in self.options.variants:
            best = self.tune(variant)
            for seed in self.options.seeds:
                self.train(replace(best, purpose="equal tokens", seed=seed))
                self.train(replace(best, purpose="equal seconds", seed=seed))

    def tune(self, variant: str) -> Job:
        """The best learning rates of those tried, here or in an earlier call."""
        best = Job(variant, "tuning", TUNING_SEED)
        for scale in self.options.lr_scales:
            self.train(replace(best, lr_scale=scale))
        best = self.results.best_tuning(variant) or best
        if extra_parameters(self.build(variant, seed=0)):
            for scale in self.options.extra_lr_scales:
                self.train(replace(best, extra_lr_scale=scale))
        return self.results.best_tuning(variant) or best

    def train(self, job: Job) -> None:
        """Make the run unless the file has it, or has one of the same length."""
        runs = self.results.runs()
        if job in runs:
            return
        same = replace(job, purpose="equal tokens")
        if self.steps(job) == self.steps(same) and same in runs and job.purpose == "equal seconds":
            self.results.add("run", job=asdict(job), bpb=runs[same], steps=self.steps(job))
            return
        training = self.training(job, self.steps(job))
        training.train(training.num_iterations)
        bpb = training.bpb(self.options.eval_tokens)
        self.results.add("run", job=asdict(job), bpb=bpb, steps=training.num_iterations, seconds=training.seconds)
        print(f"{job}: {bpb:.4f} bits per byte after {training.seconds:,.0f} s", flush=True)

    def steps(self, job: Job) -> int:
        """How long a run is; at equal seconds, as long as the plain model takes for its tokens."""
        options = self.options
        if job.purpose == "equal seconds":
            costs = self.results.costs()
            ratio = costs[PLAIN].step_seconds / costs[job.variant].step_seconds
            return max(1, round(options.tokens // options.total_batch_size * ratio))
        return (options.tuning_tokens if job.purpose == "tuning" else options.tokens) // options.total_batch_size

    def build(self, variant: str, seed: int) -> AblationGPT:
        """A fresh model."""
        torch.manual_seed(seed)
        with torch.device(self.runtime.device):
            return AblationGPT(self.config, VARIANTS[variant], self.runtime.compute_dtype)

    def training(self, job: Job, num_iterations: int) -> Training[AblationGPT]:
        """A fresh training."""
        model = self.build(job.variant, job.seed)
        return Training(
            model, AblationOptimizer(model, job.lr_scale, job.extra_lr_scale), self.text, TrainOptions(),
            total_batch_size=self.options.total_batch_size, num_iterations=num_iterations,
            device_batch_size=self.options.device_batch_size, seed=job.seed, runtime=self.runtime,
        )  # fmt: skip

    def measure_costs(self) -> None:
        """Time a step and decoding of all variants in turns.

        The lower quartile counts: other work on the machine only ever adds.
        """
        trainings = {variant: self.training(Job(variant, "tuning", 0), COST_ROUNDS + 1) for variant in VARIANTS}
        steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        decoding: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for step in range(COST_ROUNDS + 1):
            for variant, training in trainings.items():
                before = training.seconds
                training.train(step + 1)
                steps[variant].append(training.seconds - before)
                decoding[variant] += self.decode_seconds(training.model)
        for variant, training in trainings.items():
            cost = Cost(
                sum(parameter.numel() for parameter in training.model.parameters()),
                _lower_quartile(steps[variant][1:]),  # the first one warms up
                1000 * _lower_quartile(decoding[variant]),
            )
            self.results.add("cost", variant=variant, cost=asdict(cost), machine=self.runtime.describe())

    @torch.no_grad()
    def decode_seconds(self, model: AblationGPT) -> list[float]:
        """Of each greedy token at batch 1, after half a context of held-out text."""
        cache = DecodeCache(model)
        half = self.config.sequence_len // 2
        prompt = torch.from_numpy(self.text.held_out[0].tokens[:half]).to(model.device)
        token = model.decode(prompt[None], cache)[:, -1:].argmax(-1)
        seconds = []
        for _ in range(min(DECODE_TOKENS, half)):
            self.runtime.synchronize()
            begun = time.perf_counter()
            token = model.decode(token, cache)[:, -1:].argmax(-1)
            self.runtime.synchronize()
            seconds.append(time.perf_counter() - begun)
        return seconds


def _lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def main(options: AblationOptions) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)})
    results = Results(options.results, setting)
    if not options.table:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with Runtime.start(options.device_type) as runtime:
            print(f"d{options.depth}, {runtime.describe()}; {software()}", flush=True)
            Ablation(options, results, runtime).run()
    print(table(results, options.variants))


if __name__ == "__main__":
    cli.run(main, AblationOptions)
