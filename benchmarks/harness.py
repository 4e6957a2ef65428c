"""An exported model under lm-evaluation-harness, against this project's own scores on the same questions.

.venv/bin/pip install lm_eval accelerate
python -m benchmarks.harness hf_models/nanochat-d20-base

The harness reads the folder with transformers. Both are given the same texts: a question and a choice after it, without
solved examples. `acc` takes the choice of the largest summed log-likelihood, `acc_norm` of the largest per character,
`own` of the largest per token, which is what CORE counts.
"""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat import cli
from nanochat.errors import UserError
from nanochat.eval.core import CoreTask, read_tasks
from nanochat.eval.core_bundle import fetch_bundle
from nanochat.eval.multiple_choice import Option, Problem, common_prefix, score_options
from nanochat.hub.import_model import build_model, read_model
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

TASKS = ("arc_easy", "hellaswag_zeroshot")
BATCH_TOKENS = 8192


@dataclass
class BenchmarkOptions:
    """Score an exported folder twice on ARC-Easy and HellaSwag."""

    folder: Annotated[Path, tyro.conf.Positional] = Path()
    """made by hf_prepare.sh"""
    eval_bundle: Path | None = None
    """folder with the tasks of CORE; by default they are fetched once"""
    max_per_task: int = 1000
    """questions of each task"""

    def __post_init__(self) -> None:
        check_range("max_per_task", self.max_per_task, 1)


@dataclass(frozen=True)
class Shares:
    """Of one task's questions, those that were answered right by each way to choose."""

    acc: float
    acc_norm: float
    own: float | None = None


def main(options: BenchmarkOptions) -> None:
    try:
        import lm_eval
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: .venv/bin/pip install lm_eval accelerate") from None
    model = read_model(str(options.folder))
    ours = build_model(model)
    for task in read_tasks(options.eval_bundle or fetch_bundle()):
        if task.name not in TASKS:
            continue
        bare = replace(task, shots=0)
        count = min(options.max_per_task, len(bare.rows))
        own = score(ours, model.tokenizer, bare, count)
        theirs = harness(lm_eval, options.folder, bare, count)
        error = math.sqrt(own.acc * (1 - own.acc) / count)
        print(f"{task.name}, {count:,} questions, no examples; standard error {error:.2%}")
        print(f"  nanochat  acc {own.acc:.2%}  acc_norm {own.acc_norm:.2%}  own {own.own:.2%}")
        print(f"  lm_eval   acc {theirs.acc:.2%}  acc_norm {theirs.acc_norm:.2%}", flush=True)


def score(model: GPT, tokenizer: Tokenizer, task: CoreTask, count: int) -> Shares:
    """Our own scores of the first `count` problems, in float32 as the harness is told to compute."""
    own = [task.problem(i, tokenizer, model.config.sequence_len) for i in range(count)]
    whole = [_whole_choices(task, i, tokenizer, model.config.sequence_len) for i in range(count)]
    tallies = [0, 0, 0]
    for i, (by_token, scores) in enumerate(
        zip(score_options(model, own, BATCH_TOKENS), score_options(model, whole, BATCH_TOKENS), strict=True)
    ):
        lengths = [len(option.tokens) - option.start for option in whole[i].options]
        totals = [-s.mean_loss * length for s, length in zip(scores, lengths, strict=True)]
        by_character = [total / len(text) for total, text in zip(totals, task.rows[i]["choices"], strict=True)]
        for k, likelihoods in enumerate((totals, by_character, [-s.mean_loss for s in by_token])):
            tallies[k] += likelihoods.index(max(likelihoods)) == own[i].gold
    return Shares(*(right / count for right in tallies))


def _whole_choices(task: CoreTask, index: int, tokenizer: Tokenizer, context: int) -> Problem:
    """A problem with every token of a choice scored; CORE leaves out those that all choices begin with."""
    options = []
    for asked, text in task.texts(index):
        before, tokens = ([tokenizer.bos_id, *tokenizer.encode(part)] for part in (asked, text))
        cut = max(0, len(tokens) - context)
        options.append(Option(tokens[cut:], common_prefix([before, tokens]) - cut))
    return Problem(options, task.rows[index]["gold"])


def harness(lm_eval: Any, folder: Path, task: CoreTask, count: int) -> Shares:
    """What lm-evaluation-harness makes of the same problems, through a task of its own format."""
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        lines = [{"asked": task.texts(i)[0][0], **task.rows[i]} for i in range(count)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "asked",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32", "add_bos_token": True},
            tasks=[config],
            batch_size=32,
            device="cuda" if torch.cuda.is_available() else "cpu",
            bootstrap_iters=0,
        )
    found = results["results"][task.name]
    return Shares(found["acc,none"], found["acc_norm,none"])


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
