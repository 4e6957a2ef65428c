"""Evaluate every stage: a table of what each one taught, CORE and ChatCORE.

./eval.sh --source sft
"""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console
from tyro.conf import UseAppendAction

from nanochat import cli, paths
from nanochat.conversations import Conversation
from nanochat.data.packing import PackedRows
from nanochat.data.token_files import TokenFile
from nanochat.errors import UserError
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.chat_eval import ChatCore, ChatTasks
from nanochat.eval.core import Core, fetch_bundle
from nanochat.eval.evaluate import Benchmark, EvalModel, StageTasks
from nanochat.eval.results import STAGES_TABLE, Result, score_table, stage_table
from nanochat.inference.chat import ChatModel
from nanochat.report.history import pretraining_text, stages_until
from nanochat.runtime import Runtime
from nanochat.stages import STAGES
from nanochat.tasks.mixtures import load_task
from nanochat.tasks.task import GradedTask, Task
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint
from nanochat.train.options import PretrainOptions, check_range


@dataclass
class EvalOptions:
    """Evaluate the stages: bits per byte, identity, arithmetic with the tool, spelling; CORE and ChatCORE.

    Results are cached.
    """

    source: str = "all"
    """base, mid, sft, rl or all"""
    model_tag: str | None = None
    """model to evaluate; default: the newest"""
    step: int | None = None
    """checkpoint to evaluate; default: the last"""
    dataset: tuple[str, ...] = ()
    """text for bits per byte, by the names that pretrain.sh takes; default: the text that the model was trained on"""
    eval_tokens: int = 10_485_760
    """maximum number of tokens of that text"""
    max_problems: int = 500
    """held-out arithmetic problems; spelling and letter counting get a fifth as many words each"""
    benchmarks: Literal["both", "core", "chat", "none"] = "both"
    """CORE for every stage, ChatCORE for chat models, or neither"""
    task: Annotated[list[str], UseAppendAction] = field(default_factory=list)
    """FILE, folder or .py file with problems or conversations of your own, in place of all others; may be repeated"""
    max_per_task: int | None = None
    """maximum number of problems per task of CORE and ChatCORE; default: all"""
    eval_bundle: Path | None = None
    """folder with the tasks of CORE; default: download them once"""
    unconfined_code: bool = False
    """run model-written code (HumanEval) with your own permissions if the kernel cannot sandbox it"""
    device_batch_size: int = 32
    """rows of text, or replies, per batch"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        check_range("max_problems", self.max_problems, 5)
        check_range("eval_tokens", self.eval_tokens, 1)
        check_range("max_per_task", self.max_per_task, 1)
        check_range("device_batch_size", self.device_batch_size, 1)


DEMO = EvalOptions(benchmarks="none", device_batch_size=128)
QUICK = replace(DEMO, max_problems=25)


def main(options: EvalOptions) -> None:
    console = Console()
    sources = [options.source]
    if options.source == "all":
        sources = [s for s in STAGES if checkpoint.newest(s, options.model_tag, options.step)]
    if options.task and "base" in sources:
        sources.remove("base")
        if not sources:
            raise UserError("--task needs a chat model, but only a base model was found: run ./midtrain.sh first")
    if not sources:
        raise UserError(f"no checkpoints in {paths.base_dir()}: run ./pretrain.sh first")
    found = [checkpoint.find(source, options.model_tag, options.step) for source in sources]
    dataset = list(options.dataset) or pretraining_text(stages_until(found[0])) or list(PretrainOptions.dataset)
    graded, conversations = load_own(options)
    benchmarks: list[Benchmark] = [ChatTasks(graded, options.max_per_task)] if graded else []
    results: dict[str, dict[Checkpoint, Result]] = defaultdict(dict)
    with Runtime.start(options.device_type) as runtime:
        if not options.task:
            table = StageTasks(dataset, options.eval_tokens, options.max_problems, runtime)
            benchmarks = [table, *load_benchmarks(options)]
        for stage in found:
            model = EvalModel(stage, runtime, options.device_batch_size)
            with console.status(f"evaluating {stage.describe()}") as status:
                for benchmark in benchmarks:
                    if stage.source != "base" or not benchmark.needs_chat:
                        results[benchmark.name][stage] = model.result(benchmark, status.update)
                for task in conversations:
                    bits = answer_bits_per_byte(model.chat, task, options.device_batch_size, runtime)
                    console.print(f"{stage.describe()}: {bits:.3f} bits per byte of the answers in {task.name}")
    for name, by_stage in results.items():
        by_source = {stage.source: result for stage, result in by_stage.items()}
        console.print(stage_table(by_stage) if name == STAGES_TABLE else score_table(name, by_source))
    report = [sys.executable, "-m", "scripts.report", "--model-tag", found[-1].tag, "--quiet"]
    subprocess.run(report, check=False)


def answer_bits_per_byte(
    chat: ChatModel, rows: Iterable[Conversation], device_batch_size: int, runtime: Runtime
) -> float:
    """Bits per byte of the assistant's turns, given everything before them; what exceeds the context is left out."""
    rendered = [chat.tokenizer.render_conversation(row) for row in rows]
    offsets = np.cumsum([0, *(len(row.ids) for row in rendered)])
    ids, mask = (np.concatenate(part) for part in zip(*rendered, strict=True))
    file = TokenFile(ids, offsets, mask, 0)
    packed = PackedRows(file, chat.context, chat.tokenizer.bos_id, learn_all=False, documents_per_row=1)
    return bits_per_byte(chat.engine.model, chat.tokenizer, packed, device_batch_size, sys.maxsize, runtime)


def load_own(options: EvalOptions) -> tuple[list[GradedTask], list[Task]]:
    """The tasks that --task names: those with graders, and conversations."""
    graded: list[GradedTask] = []
    conversations: list[Task] = []
    for name in options.task:
        task = load_task(name, graded=False, split="test")
        if any("grader" in row for row in task):
            task = load_task(name, graded=True)
        if isinstance(task, GradedTask):
            graded.append(task)
        else:
            conversations.append(task)
    return graded, conversations


def load_benchmarks(options: EvalOptions) -> list[Benchmark]:
    """The benchmarks that --benchmarks names, data loaded, so that a download fails before hours of work, not after."""
    benchmarks: list[Benchmark] = []
    if options.benchmarks in ("both", "core"):
        benchmarks.append(Core(options.eval_bundle or fetch_bundle(), options.max_per_task))
    if options.benchmarks in ("both", "chat"):
        benchmarks.append(ChatCore(options.max_per_task, unconfined_code=options.unconfined_code))
    return benchmarks


if __name__ == "__main__":
    cli.run(main, EvalOptions, demo=DEMO, quick=QUICK)
