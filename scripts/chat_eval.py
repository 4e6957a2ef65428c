"""The table of what each stage taught, and the scores of CORE and ChatCORE.

./eval.sh --source sft
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.eval.benchmark import Benchmark
from nanochat.eval.candidate import Candidate
from nanochat.eval.chat_core import ChatCore
from nanochat.eval.core import Core
from nanochat.eval.core_bundle import fetch_bundle
from nanochat.eval.scores import Scores, score_table
from nanochat.eval.stages import Effort, StageResult, measure, table
from nanochat.report import build
from nanochat.runtime import Runtime
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.options import check_range


@dataclass
class EvalOptions:
    """Measure the stages: bits per byte, identity, arithmetic with the tool, spelling; CORE and ChatCORE.

    Results are kept.
    """

    source: str = "all"
    """base, mid, sft, rl or all there are"""
    model_tag: str | None = None
    """which model; by default the newest"""
    step: int | None = None
    """which checkpoint; by default the last"""
    dataset: str = "fineweb-edu"
    """text for bits per byte"""
    eval_tokens: int = 10_485_760
    """tokens of it, at most"""
    max_problems: int = 500
    """held-out sums; a fifth as many words to spell and to count letters of"""
    tasks: Literal["both", "core", "chat", "none"] = "both"
    """CORE for every stage, ChatCORE for those that have learned to chat, or neither"""
    max_per_task: int | None = None
    """problems of each of their tasks, at most; by default all"""
    eval_bundle: Path | None = None
    """folder with the tasks of CORE; by default they are fetched once"""
    unconfined_code: bool = False
    """run model-written code (HumanEval) with your own rights where the kernel cannot confine it"""
    device_batch_size: int = 32
    """rows of text, or replies, at a time"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        check_range("max_problems", self.max_problems, 5)
        check_range("eval_tokens", self.eval_tokens, 1)
        check_range("max_per_task", self.max_per_task, 1)
        check_range("device_batch_size", self.device_batch_size, 1)


DEMO = EvalOptions(dataset="encyclopedia", model_tag="d4", tasks="none", device_batch_size=128)
QUICK = replace(DEMO, model_tag="d2", max_problems=25)


def main(options: EvalOptions) -> None:
    console = Console()
    effort = Effort(options.dataset, options.eval_tokens, options.max_problems)
    sources = [options.source]
    if options.source == "all":
        sources = [s for s in STAGES if checkpoint.newest(s, options.model_tag, options.step)]
    if not sources:
        raise UserError(f"there is no checkpoint in {paths.base_dir()}: run ./pretrain.sh first")
    found = [checkpoint.find(source, options.model_tag, options.step) for source in sources]
    wanted = benchmarks(options)
    results: list[StageResult] = []
    scores: dict[str, Scores] = {benchmark.name: {} for benchmark in wanted}
    with Runtime.start(options.device_type) as runtime:
        for stage in found:
            candidate = Candidate(stage, runtime, options.device_batch_size)
            with console.status(f"measuring {stage.describe()}") as status:
                results.append(measure(candidate, effort))
                for benchmark in wanted:
                    if benchmark.suits(stage.source):
                        scores[benchmark.name][stage.source] = benchmark.measure(candidate, status.update)
    console.print(table(results))
    for name, stages in scores.items():
        if stages:
            console.print(score_table(name, stages))
    build.rebuild(found[-1].tag)


def benchmarks(options: EvalOptions) -> list[Benchmark]:
    """Those that are asked for, with their data: a failed download or a refusal comes before hours of work."""
    wanted: list[Benchmark] = []
    if options.tasks in ("both", "core"):
        wanted.append(Core(options.eval_bundle or fetch_bundle(), options.max_per_task))
    if options.tasks in ("both", "chat"):
        wanted.append(ChatCore(options.max_per_task, unconfined_code=options.unconfined_code))
    return wanted


if __name__ == "__main__":
    cli.run(main, EvalOptions, demo=DEMO, quick=QUICK)
