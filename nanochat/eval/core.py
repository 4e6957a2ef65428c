"""CORE: 22 tasks of language, knowledge and reasoning, for models that have learned to chat and those that have not.

The mean over the tasks of (accuracy - baseline) / (1 - baseline), as in DataComp-LM (https://arxiv.org/abs/2406.11794):
0 is guessing. GPT-2 has 0.114 and GPT-2 XL 0.257 by the bundle's reference scores.
"""

from pathlib import Path
from typing import Any

from nanochat.eval.benchmark import Benchmark, OnTask
from nanochat.eval.core_tasks import CoreTask, fingerprint, read_tasks
from nanochat.eval.option_scores import is_right, score_options
from nanochat.eval.scores import TaskScore
from nanochat.inference.chat import ChatModel
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

PROBLEMS_AT_A_TIME = 2048
"""Sorted by length together: enough for even batches, few enough to hold in memory."""


class Core(Benchmark):
    """The tasks of one bundle."""

    name = "CORE"

    def __init__(self, bundle: Path, max_per_task: int | None = None) -> None:
        """At most `max_per_task` problems of each, by default all. Raises UserError if the folder is no bundle."""
        self.tasks = read_tasks(bundle)
        self.bundle = bundle
        self.max_per_task = max_per_task

    def key(self) -> dict[str, Any]:
        """The bundle's hash, and how much of it."""
        return {"bundle": fingerprint(self.bundle), "max_per_task": self.max_per_task}

    def scores(self, chat: ChatModel, batch_tokens: int, on_task: OnTask) -> list[TaskScore]:
        """The score of each task; `baseline` is the bundle's."""
        scores = []
        for task in self.tasks:
            on_task(task.name)
            right = right_answers(chat.engine.model, chat.tokenizer, task, batch_tokens, self.max_per_task)
            scores.append(TaskScore(task.name, len(right), sum(right) / len(right), task.baseline))
        return scores


def right_answers(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, batch_tokens: int, max_per_task: int | None = None
) -> list[bool]:
    """Of each of the task's first problems, whether the model gets it right."""
    count = min(len(task.rows), max_per_task or len(task.rows))
    right: list[bool] = []
    for first in range(0, count, PROBLEMS_AT_A_TIME):
        indices = range(first, min(first + PROBLEMS_AT_A_TIME, count))
        problems = [task.problem(i, tokenizer, model.config.sequence_len) for i in indices]
        right.extend(map(is_right, problems, score_options(model, problems, batch_tokens)))
    return right
