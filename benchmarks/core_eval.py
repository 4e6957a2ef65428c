"""How fast CORE is scored: batched, against one option at a time.

python -m benchmarks.core_eval --eval-bundle FOLDER
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import cli
from nanochat.data import demo_data
from nanochat.eval.core import read_tasks
from nanochat.eval.core_bundle import fetch_bundle
from nanochat.eval.multiple_choice import OptionScore, Problem, is_right, score_options
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

PLAIN = "one option at a time"


@dataclass
class BenchmarkOptions:
    """Time the scoring of some problems of every task, with a random model and a tokenizer made for it."""

    eval_bundle: Path | None = None
    """folder with the tasks of CORE; by default they are fetched once"""
    depth: int = 4
    vocab_size: int = 65_536
    """of the model; the tokenizer, trained on the text that comes with the installation, may have fewer"""
    max_seq_len: int = 2048
    problems_per_task: int = 8
    device_batch_size: int = 8
    """rows of the whole context in one forward pass, or as many tokens in shorter ones"""
    repeats: int = 3
    """times that each way is timed, in turn; the median counts"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        for name in ("problems_per_task", "device_batch_size", "repeats"):
            check_range(name, getattr(self, name), 1)


def main(options: BenchmarkOptions) -> None:
    runtime = Runtime.start(options.device_type)
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(demo_data.documents("train"), options.vocab_size)
    config = GPTConfig.from_depth(options.depth, options.vocab_size, options.max_seq_len)
    model = GPT(config, runtime.compute_dtype).to(runtime.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    tasks = read_tasks(options.eval_bundle or fetch_bundle())
    problems = [
        task.problem(i, tokenizer, options.max_seq_len)
        for task in tasks
        for i in range(min(len(task.rows), options.problems_per_task))
    ]
    batch_tokens = options.device_batch_size * options.max_seq_len
    ways: dict[str, Callable[[], list[list[OptionScore]]]] = {
        PLAIN: lambda: [one_at_a_time(model, problem) for problem in problems],
        "the same, scored logits only": lambda: [alone(model, problem) for problem in problems],
        "one problem at a time": lambda: [next(score_options(model, [problem], 1)) for problem in problems],
        "batched": lambda: list(score_options(model, problems, batch_tokens)),
    }
    print(
        f"d{options.depth}, vocabulary {config.vocab_size:,}, context {options.max_seq_len}, {runtime.describe()}: "
        f"{len(problems)} problems of {len(tasks)} tasks, {sum(len(p.options) for p in problems)} options, "
        f"{sum(len(option.tokens) for p in problems for option in p.options):,} tokens"
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    right: dict[str, list[bool]] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            scores = way()  # the answers arrive on the CPU, so the device is done
            seconds[name].append(time.perf_counter() - begun)
            right[name] = [is_right(problem, score) for problem, score in zip(problems, scores, strict=True)]
    slowest = statistics.median(seconds[PLAIN])
    for name, times in seconds.items():
        median = statistics.median(times)
        same = sum(a == b for a, b in zip(right[name], right[PLAIN], strict=True))
        print(
            f"{name:<28} {median:7.2f}s {len(problems) / median:7.1f} problems/s {slowest / median:5.1f}x, "
            f"same answer to {same} of {len(problems)}"
        )


@torch.inference_mode()
def one_at_a_time(model: GPT, problem: Problem) -> list[OptionScore]:
    """The plain way: a forward pass for each option, with the logits of all its tokens."""
    scores = []
    for option in problem.options:
        tokens = torch.tensor([option.tokens], device=model.device)
        logits, targets = model(tokens)[0, option.start - 1 : -1], tokens[0, option.start :]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        scores.append(OptionScore(float(loss), bool((logits.argmax(dim=1) == targets).all())))
    return scores


def alone(model: GPT, problem: Problem) -> list[OptionScore]:
    """A forward pass for each option, with the logits of its scored tokens: what sharing and batching start from."""
    return [next(score_options(model, [Problem([option], 0)], 1))[0] for option in problem.options]


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
