"""What CORE and ChatCORE have in common: scores on several tasks, kept for each checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from nanochat.eval.candidate import Candidate
from nanochat.eval.scores import TaskScore
from nanochat.inference.chat import ChatModel

OnTask = Callable[[str], None]
"""Hears what is being done, for a person to see."""


class Benchmark(ABC):
    """Tasks whose scores make one number."""

    name: str

    @abstractmethod
    def key(self) -> Mapping[str, Any]:
        """All that the scores depend on but the model."""

    @abstractmethod
    def scores(self, chat: ChatModel, batch_tokens: int, on_task: OnTask) -> list[TaskScore]:
        """The score of each task. `batch_tokens`: most tokens in one forward pass, padding counted."""

    def suits(self, source: str) -> bool:
        """Whether models of that stage can be asked."""
        return True

    def measure(self, candidate: Candidate, on_task: OnTask) -> list[TaskScore]:
        """The scores of one checkpoint: those that are kept in report/, or new ones, which are kept there."""

        def measured() -> list[dict[str, Any]]:
            chat = candidate.chat
            scores = self.scores(chat, candidate.batch_tokens, lambda task: on_task(f"{chat.description}: {task}"))
            return [asdict(score) for score in scores]

        return [TaskScore(**score) for score in candidate.result(f"-{self.name.lower()}", self.key(), measured)]
