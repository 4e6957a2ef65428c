"""CORE: 22 tasks of language, knowledge and reasoning, for models that have not learned to chat or have.

The mean over the tasks of (accuracy - baseline) / (1 - baseline), as in DataComp-LM (https://arxiv.org/abs/2406.11794):
0 is guessing. GPT-2 has 0.114 and GPT-2 XL 0.257 by the bundle's reference scores.
"""

from collections.abc import Callable, Sequence

from nanochat.eval.core_tasks import CoreTask, Problem
from nanochat.eval.option_scores import OptionScore, score_options
from nanochat.eval.scores import TaskScore
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

PROBLEMS_AT_A_TIME = 2048
"""Sorted by length together: enough for even batches, few enough to hold in memory."""


def core_scores(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    batch_tokens: int,
    max_per_task: int | None = None,
    on_task: Callable[[str], None] = lambda name: None,
) -> list[TaskScore]:
    """The score of each task on its first `max_per_task` problems, by default all.

    `batch_tokens`: most tokens in one forward pass; `on_task` hears the name of each task as it begins.
    """
    scores = []
    for task in tasks:
        on_task(task.name)
        answers = right_answers(model, tokenizer, task, batch_tokens, max_per_task)
        scores.append(TaskScore(task.name, len(answers), sum(answers) / len(answers), task.baseline))
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


def is_right(problem: Problem, options: Sequence[OptionScore]) -> bool:
    """Whether the model prefers the right option, or would write the only one word for word."""
    if len(options) == 1:
        return options[0].is_greedy
    losses = [option.mean_loss for option in options]
    return losses.index(min(losses)) == problem.gold
