"""Accuracy of an exported model in lm-evaluation-harness and in this project, on the same questions.

.venv/bin/python -m pip install lm_eval accelerate
python -m benchmarks.export_accuracy hf_models/nanochat-d20-base

The harness loads the folder with transformers. Both score the same texts in float32: a question followed by a choice,
without examples. `acc` takes the choice with the largest total log-likelihood, `acc_norm` the largest per character,
`core` the largest per token, as CORE does.
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
from nanochat.eval.core import CoreTask, fetch_bundle, read_tasks
from nanochat.eval.multiple_choice import Option, Problem, common_prefix, score_options
from nanochat.hub.import_model import read_model
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

TASKS = ("arc_easy", "hellaswag_zeroshot")
BATCH_TOKENS = 8192


@dataclass
class BenchmarkOptions:
    """Score an exported model on ARC-Easy and HellaSwag, here and in lm-evaluation-harness."""

    folder: Annotated[Path, tyro.conf.Positional] = Path()
    """made by hf_prepare.sh"""
    eval_bundle: Path | None = None
    """folder with the tasks of CORE; by default they are downloaded once"""
    max_per_task: int = 1000
    """questions per task"""

    def __post_init__(self) -> None:
        check_range("max_per_task", self.max_per_task, 1)


def main(options: BenchmarkOptions) -> None:
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "lm-evaluation-harness is not installed: .venv/bin/python -m pip install lm_eval accelerate"
        ) from None
    imported = read_model(str(options.folder))
    for task in read_tasks(options.eval_bundle or fetch_bundle()):
        if task.name not in TASKS:
            continue
        zero_shot = replace(task, shots=0)
        count = min(options.max_per_task, len(zero_shot.rows))
        ours = accuracies(imported.model, imported.tokenizer, zero_shot, count)
        error = math.sqrt(ours["acc"] * (1 - ours["acc"]) / count)
        print(f"{task.name}, {count:,} questions, zero-shot; standard error {error:.2%}")
        for name, scores in (("nanochat", ours), ("lm_eval", harness(lm_eval, options.folder, zero_shot, count))):
            print(f"  {name:<9}", *(f"{kind} {score:.2%} " for kind, score in scores.items()), flush=True)


def accuracies(model: GPT, tokenizer: Tokenizer, task: CoreTask, count: int) -> dict[str, float]:
    """Accuracies of this project's scorer on the first `count` questions."""
    context = model.config.sequence_len
    problems = [task.problem(i, tokenizer, context) for i in range(count)]
    unshortened = [full_choices(task, i, tokenizer, context) for i in range(count)]
    correct = {"acc": 0, "acc_norm": 0, "core": 0}
    for i, (core_scores, scores) in enumerate(
        zip(score_options(model, problems, BATCH_TOKENS), score_options(model, unshortened, BATCH_TOKENS), strict=True)
    ):
        lengths = [len(option.tokens) - option.start for option in unshortened[i].options]
        totals = [-score.mean_loss * length for score, length in zip(scores, lengths, strict=True)]
        likelihoods = {
            "acc": totals,
            "acc_norm": [total / len(text) for total, text in zip(totals, task.rows[i]["choices"], strict=True)],
            "core": [-score.mean_loss for score in core_scores],
        }
        for name, values in likelihoods.items():
            correct[name] += values.index(max(values)) == problems[i].gold
    return {name: number / count for name, number in correct.items()}


def full_choices(task: CoreTask, index: int, tokenizer: Tokenizer, context: int) -> Problem:
    """A problem in which all tokens of a choice are scored; CORE leaves out the prefix that all choices share."""
    options = []
    for question, text in task.texts(index):
        prefix, tokens = ([tokenizer.bos_id, *tokenizer.encode(part)] for part in (question, text))
        cut = max(0, len(tokens) - context)
        options.append(Option(tokens[cut:], common_prefix([prefix, tokens]) - cut))
    return Problem(options, task.rows[index]["gold"])


def harness(lm_eval: Any, folder: Path, task: CoreTask, count: int) -> dict[str, float]:
    """Accuracies of lm-evaluation-harness on the same questions, passed to it as a custom task."""
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        lines = [{"question": task.texts(i)[0][0], **task.rows[i]} for i in range(count)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
        config = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": metrics,
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
    return {"acc": found["acc,none"], "acc_norm": found["acc_norm,none"]}


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
