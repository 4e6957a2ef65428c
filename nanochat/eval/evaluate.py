"""Evaluate a checkpoint: the table of stages and the benchmarks, with results cached in report/."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from nanochat.atomic import atomic_write
from nanochat.data import demo_data
from nanochat.data.batches import StreamRows
from nanochat.data.sources import MixedText
from nanochat.eval import results
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.chat_eval import reply_grades
from nanochat.eval.results import IDENTITY_QUESTIONS, StageEvalConfig, StageResult, TaskScore
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.runtime import Runtime
from nanochat.tasks.arithmetic import Sums
from nanochat.tasks.identity import IdentityQuestions
from nanochat.tasks.spelling import DEMO_WORDS, LetterCount, Spelling
from nanochat.tasks.task import GradedTask
from nanochat.train.checkpoint import Checkpoint

MAX_REPLY_TOKENS = 64


class Benchmark(Protocol):
    """Several tasks whose scores average to one number: CORE, ChatCORE."""

    name: str
    needs_chat: bool  # leave out base models

    def key(self) -> Mapping[str, Any]:
        """Everything that the scores depend on, except the model."""

    def scores(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> list[TaskScore]:
        """Evaluate each task. `batch_tokens` limits one forward pass, padding included; `on_task` gets each name."""


@dataclass
class EvalModel:
    """A checkpoint to evaluate. It is loaded only if some result is not cached."""

    checkpoint: Checkpoint
    runtime: Runtime
    device_batch_size: int  # rows of text, or replies, per batch

    @cached_property
    def chat(self) -> ChatModel:
        return load_chat(self.checkpoint, self.runtime.device.type, self.device_batch_size)

    def cached(self, suffix: str, key: Mapping[str, Any], evaluate: Callable[[], Any]) -> Any:
        """Return the saved result if its key matches, else save and return `evaluate()`, which must be JSON."""
        full_key = {"saved_at": self.checkpoint.meta["saved_at"], **key}
        saved = results.saved_result(self.checkpoint, suffix)
        if saved and saved[0] == full_key:
            return saved[1]
        result = evaluate()
        file = results.result_file(self.checkpoint, suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(json.dumps({"key": full_key, "result": result}, indent=2) + "\n")
        return result

    def benchmark(self, benchmark: Benchmark, on_task: Callable[[str], None]) -> list[TaskScore]:
        """Scores on the benchmark's tasks; `on_task` gets a progress message before each."""

        def evaluate() -> list[dict[str, Any]]:
            batch_tokens = self.device_batch_size * self.chat.context
            scores = benchmark.scores(self.chat, batch_tokens, lambda task: on_task(f"{self.chat.description}: {task}"))
            return [asdict(score) for score in scores]

        return [TaskScore(**score) for score in self.cached(f"-{benchmark.name.lower()}", benchmark.key(), evaluate)]

    def stage_result(self, config: StageEvalConfig) -> StageResult:
        """Bits per byte, and the shares of identity, arithmetic and spelling questions answered correctly."""
        return StageResult(**self.cached("", asdict(config), lambda: asdict(self._evaluate_stage(config))))

    def _evaluate_stage(self, config: StageEvalConfig) -> StageResult:
        found, chat = self.checkpoint, self.chat
        text = MixedText.open(config.dataset, "val", chat.tokenizer, config.eval_tokens)
        rows = StreamRows(text.stream, chat.context, chat.tokenizer.bos_id)
        words = demo_data.frequent_words(DEMO_WORDS)

        def accuracy(task: GradedTask, count: int) -> float:
            grades = reply_grades(chat, task, range(min(len(task), count)), MAX_REPLY_TOKENS)
            return sum(grades) / len(grades)

        return StageResult(
            found.source,
            found.tag,
            found.step,
            bits_per_byte(
                chat.engine.model, chat.tokenizer, rows, self.device_batch_size, config.eval_tokens, self.runtime
            ),
            identity=accuracy(IdentityQuestions(), IDENTITY_QUESTIONS),
            arithmetic=accuracy(Sums("test", config.problems), config.problems),
            spelling=sum(accuracy(task(words, "test"), config.problems // 5) for task in (Spelling, LetterCount)) / 2,
            seconds=found.meta["seconds"],
        )
