"""ChatCORE: six tasks for chat models, as in karpathy/nanochat.

Multiple choice (ARC-Easy, ARC-Challenge, MMLU) takes the likeliest letter at the reply's first token. GSM8K, HumanEval
and letter counting grade greedy replies. The metric is the mean of (accuracy - baseline) / (1 - baseline).
"""

import os
import random
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from nanochat.eval.multiple_choice import Option, Problem, is_right, score_options
from nanochat.eval.results import Result, TaskScore
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.multiple_choice import ARC, MMLU, CategoricalTask
from nanochat.tasks.spelling import LetterCount, spelling_words
from nanochat.tasks.task import GradedTask, score

MAX_REPLY_TOKENS = 512
NUM_WORDS = 256  # words to count letters in
ORDER_SEED = 1337


class ChatTasks:
    """Tasks for chat models, such as the user's own. A `Benchmark`."""

    name = "tasks"
    needs_chat = True

    def __init__(self, tasks: Sequence[GradedTask], max_per_task: int | None = None) -> None:
        self.tasks, self.max_per_task = tasks, max_per_task

    def key(self) -> dict[str, Any]:
        tasks = [task.fingerprint for task in self.tasks]
        return {"tasks": tasks, "max_per_task": self.max_per_task, "max_reply_tokens": MAX_REPLY_TOKENS}

    def evaluate(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> Result:
        scores = []
        for task in self.tasks:
            on_task(task.name)
            count = NUM_WORDS if isinstance(task, LetterCount) else len(task)
            indices = sample_indices(len(task), min(count, self.max_per_task or count))
            if isinstance(task, CategoricalTask):
                grades = letter_grades(chat, task, indices, batch_tokens)
                baseline = sum(1 / len(task.letters(i)) for i in indices) / len(indices)
            else:
                grades, baseline = reply_grades(chat, task, indices), 0.0
            scores.append(TaskScore(task.name, len(grades), sum(grades) / len(grades), baseline))
        return Result(scores)


class ChatCore(ChatTasks):
    """The six tasks of ChatCORE."""

    name = "ChatCORE"

    def __init__(self, max_per_task: int | None = None, *, unconfined_code: bool = False) -> None:
        """Download the tasks. Raises UserError if that fails, or without a sandbox unless `unconfined_code`."""
        humaneval = HumanEval(unconfined=unconfined_code)
        tasks: list[GradedTask] = [
            ARC("Easy", "test"),
            ARC("Challenge", "test"),
            MMLU("test"),
            GSM8K("test"),
            humaneval,
            LetterCount(spelling_words(), "test"),
        ]
        super().__init__(tasks, max_per_task)


def sample_indices(length: int, count: int) -> list[int]:
    """Pick `count` of `length` indices, the same ones each time: MMLU, for example, is sorted by subject."""
    return random.Random(ORDER_SEED).sample(range(length), min(count, length))


def letter_grades(chat: ChatModel, task: CategoricalTask, indices: Sequence[int], batch_tokens: int) -> list[float]:
    """1.0 for each problem whose right letter is the likeliest, else 0.0. Long prompts are truncated on the left."""
    problems = []
    for i in indices:
        prompt = chat.prompt(task[i]["messages"][:-1])[-(chat.context - 1) :]
        letters = [chat.tokenizer.encode(letter) for letter in task.letters(i)]
        options = [Option([*prompt, *letter], len(prompt)) for letter in letters]
        problems.append(Problem(options, task.choices(i).answer))
    scores = score_options(chat.engine.model, problems, batch_tokens)
    return [float(is_right(problem, score)) for problem, score in zip(problems, scores, strict=True)]


def reply_grades(
    chat: ChatModel, task: GradedTask, indices: Sequence[int], max_tokens: int = MAX_REPLY_TOKENS
) -> list[float]:
    """Grade each greedy reply, 0 to 1. It may take half the context; a prompt longer than the rest loses its start."""
    problems = [task[i] for i in indices]
    max_tokens = min(max_tokens, chat.context // 2)
    prompts = [chat.prompt(problem["messages"][:-1], max_tokens) for problem in problems]
    completions = chat.engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0))
    replies = [reply_parts(chat.tokenizer, completion.tokens) for completion in completions]
    # HumanEval waits for the programs that it runs. Each needs up to 14 open files (ulimit -n).
    workers = min(os.cpu_count() or 1, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 24))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(partial(score, task), problems, replies))
