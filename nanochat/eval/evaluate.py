"""Evaluate a checkpoint on benchmarks, such as the table of stages, with results saved in report/."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

from nanochat.atomic import atomic_write
from nanochat.data import demo_data
from nanochat.data.batches import StreamRows
from nanochat.data.sources import MixedText
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.chat_eval import reply_grades
from nanochat.eval.results import STAGES_TABLE, Result, TaskScore, result_file, saved_result
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.runtime import Runtime
from nanochat.tasks.arithmetic import Sums
from nanochat.tasks.identity import IdentityQuestions
from nanochat.tasks.spelling import DEMO_WORDS, LetterCount, Spelling
from nanochat.tasks.task import GradedTask
from nanochat.train.checkpoint import Checkpoint

MAX_REPLY_TOKENS = 64


class Benchmark(Protocol):
    """Several tasks: the table of stages, CORE, ChatCORE."""

    name: str
    needs_chat: bool  # leave out base models

    def key(self) -> Mapping[str, Any]:
        """Everything that the scores depend on, except the model."""

    def evaluate(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> Result:
        """Evaluate each task. `batch_tokens` limits one forward pass, padding included; `on_task` gets each name."""


@dataclass
class EvalModel:
    """A checkpoint to evaluate. It is loaded only if some result is not saved."""

    checkpoint: Checkpoint
    runtime: Runtime
    device_batch_size: int  # rows of text, or replies, per batch

    @cached_property
    def chat(self) -> ChatModel:
        return load_chat(self.checkpoint, self.runtime.device.type, self.device_batch_size)

    def result(self, benchmark: Benchmark, on_task: Callable[[str], None]) -> Result:
        """Result on a benchmark, saved until its key changes; `on_task` gets a progress message before each task."""
        key = {"saved_at": self.checkpoint.meta["saved_at"], **benchmark.key()}
        saved = saved_result(self.checkpoint, benchmark.name)
        if saved and saved[0] == key:
            return saved[1]
        stage, batch_tokens = self.checkpoint.describe(), self.device_batch_size * self.chat.context
        result = benchmark.evaluate(self.chat, batch_tokens, lambda task: on_task(f"{stage}: {task}"))
        file = result_file(self.checkpoint, benchmark.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(json.dumps({"key": key, "result": asdict(result)}, indent=2) + "\n")
        return result


@dataclass
class StageTasks:
    """Bits per byte of held-out text, and what the stages teach. A `Benchmark`."""

    dataset: list[str]
    eval_tokens: int  # maximum number of tokens of that text
    problems: int  # number of held-out sums; a fifth as many words to spell, and to count letters in
    runtime: Runtime
    name = STAGES_TABLE
    needs_chat = False

    def key(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "eval_tokens": self.eval_tokens, "problems": self.problems}

    def evaluate(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> Result:
        on_task("bits per byte")
        text = MixedText.open(self.dataset, "val", chat.tokenizer, self.eval_tokens)
        rows, model = StreamRows(text.stream, chat.context, chat.tokenizer.bos_id), chat.engine.model
        batch_rows = batch_tokens // chat.context
        bits = bits_per_byte(model, chat.tokenizer, rows, batch_rows, self.eval_tokens, self.runtime)
        words = demo_data.frequent_words(DEMO_WORDS)
        tasks: dict[str, list[GradedTask]] = {
            "identity": [IdentityQuestions()],
            "arithmetic": [Sums("test", self.problems)],
            "spelling": [Spelling(words, "test"), LetterCount(words, "test")],
        }
        scores = []
        for name, parts in tasks.items():
            on_task(name)
            count = self.problems // 5 if name == "spelling" else self.problems
            graded = (reply_grades(chat, task, range(min(count, len(task))), MAX_REPLY_TOKENS) for task in parts)
            grades = list(chain(*graded))
            scores.append(TaskScore(name, len(grades), sum(grades) / len(grades), 0.0))
        return Result(scores, bits)
