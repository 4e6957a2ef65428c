"""ChatCORE: six tasks for models that have learned to chat, as in nanochat's seed.

Multiple choice (ARC-Easy, ARC-Challenge, MMLU) by the likeliest letter in the place of the reply's first token; GSM8K,
HumanEval and letter counting by letting the model write, greedily. The mean of (accuracy - baseline) / (1 - baseline).
"""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanochat import paths
from nanochat.data import embedded
from nanochat.data.words import read_words
from nanochat.eval.benchmark import Benchmark, OnTask
from nanochat.eval.option_scores import Option, Problem, is_right, score_options
from nanochat.eval.scores import TaskScore
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.sandbox.runner import run_program
from nanochat.tasks.arc import ARC
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.mixtures import DEMO_WORDS
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.multiple_choice import CategoricalTask
from nanochat.tasks.spelling import LetterCount
from nanochat.tasks.task import GradedTask

MAX_REPLY_TOKENS = 512
WORDS_TO_COUNT_IN = 256
ORDER_SEED = 1337


class ChatCore(Benchmark):
    """The six tasks."""

    name = "ChatCORE"

    def __init__(self, max_per_task: int | None = None, *, unconfined_code: bool = False) -> None:
        """At most `max_per_task` problems of each, by default all (of the words, 256). Fetches what is missing.

        Raises UserError if it cannot, or where model-written code cannot be confined and that was not waived.
        """
        run_program("", unconfined=unconfined_code)  # a refusal should come before an hour of work
        self.max_per_task = max_per_task
        file = paths.words_file()
        words = read_words(file) if file.exists() else embedded.frequent_words(DEMO_WORDS)
        self.tasks: list[GradedTask] = [
            ARC("Easy", "test"),
            ARC("Challenge", "test"),
            MMLU("test"),
            GSM8K("test"),
            HumanEval(unconfined=unconfined_code),
            LetterCount(words, "test"),
        ]

    def key(self) -> dict[str, Any]:
        """The tasks' hashes, how much of them, and how long a reply may be."""
        fingerprints = [task.fingerprint for task in self.tasks]
        return {"tasks": fingerprints, "max_per_task": self.max_per_task, "max_reply_tokens": MAX_REPLY_TOKENS}

    def suits(self, source: str) -> bool:
        """A base model does not know the chat format."""
        return source != "base"

    def scores(self, chat: ChatModel, batch_tokens: int, on_task: OnTask) -> list[TaskScore]:
        """The score of each task; `baseline` is one over the number of letters to choose from, or 0."""
        scores = []
        for task in self.tasks:
            on_task(task.name)
            most = WORDS_TO_COUNT_IN if isinstance(task, LetterCount) else len(task)
            indices = sample_indices(len(task), min(most, self.max_per_task or most))
            if isinstance(task, CategoricalTask):
                grades = letter_grades(chat, task, indices, batch_tokens)
                baseline = sum(1 / len(task.letters(i)) for i in indices) / len(indices)
            else:
                grades, baseline = reply_grades(chat, task, indices), 0.0
            scores.append(TaskScore(task.name, len(grades), sum(grades) / len(grades), baseline))
        return scores


def sample_indices(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, always the same: MMLU, for one, is in the order of its subjects."""
    return random.Random(ORDER_SEED).sample(range(length), min(count, length))


def letter_grades(chat: ChatModel, task: CategoricalTask, indices: Sequence[int], batch_tokens: int) -> list[float]:
    """1.0 for each problem whose right letter is the likeliest of its letters, else 0.0.

    A prompt longer than the context loses its beginning.
    """
    problems = []
    for i in indices:
        prompt = chat.prompt(task.prompt(task[i]))[-(chat.context - 1) :]
        letters = [chat.tokenizer.encode(letter) for letter in task.letters(i)]
        options = [Option([*prompt, *letter], len(prompt)) for letter in letters]
        problems.append(Problem(options, task.choices(i).answer))
    scores = score_options(chat.engine.model, problems, batch_tokens)
    return [float(is_right(problem, score)) for problem, score in zip(problems, scores, strict=True)]


def reply_grades(chat: ChatModel, task: GradedTask, indices: Sequence[int]) -> list[float]:
    """The grade of the greedy reply to each problem; a prompt that leaves no room for one loses its beginning."""
    problems = [task[i] for i in indices]
    room = min(MAX_REPLY_TOKENS, chat.context // 2)
    prompts = [chat.prompt(task.prompt(problem))[-(chat.context - room) :] for problem in problems]
    completions = chat.engine.generate(prompts, SamplingParams(max_tokens=room, temperature=0))
    replies = [reply_parts(chat.tokenizer, completion.tokens) for completion in completions]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # HumanEval waits for the programs that it runs
        return list(pool.map(task.grade, problems, replies))
