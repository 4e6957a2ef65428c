"""What a task is: a sequence of conversations that can be trained on and, if it is graded, scored."""

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from itertools import accumulate
from typing import Literal, overload

from nanochat.conversations import Conversation, Message, Part

Split = Literal["train", "test"]
Reply = str | list[Part]


class Task(Sequence[Conversation], ABC):
    """Conversations by index, each with its reference answer. The same index gives the same conversation for ever.

    The train and test split of a task never share a problem: a stable hash of the problem itself decides
    (nanochat.data.splits.held_out), not an order, a seed or a size.
    """

    name: str

    @abstractmethod
    def row(self, index: int) -> Conversation:
        """The conversation at 0 <= index < len(self), in constant time."""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of its conversations: others give another one."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, there is no row {index}")
        return self.row(index % len(self))


class GradedTask(Task):
    """A task whose replies can be scored."""

    @abstractmethod
    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """How good `reply` is as the last turn of `conversation`: 0.0 wrong to 1.0 right."""

    def prompt(self, conversation: Conversation) -> list[Message]:
        """The messages up to the turn that is graded."""
        return conversation["messages"][:-1]


class NumberTask(GradedTask):
    """A task whose answer is the last number of the reply."""

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the last number of the reply's final text equals the reference's exactly, else 0.0."""
        expected = last_number(final_text(conversation["messages"][-1]["content"]))
        return float(expected is not None and last_number(final_text(reply)) == expected)


class Mixture(Task):
    """Several tasks as one, shuffled. A task repeated 2.0 times shows every row twice; 0.5 times, its first half."""

    def __init__(self, tasks: Sequence[Task | tuple[Task, float]], seed: int = 0, name: str = "mixture") -> None:
        pairs = [task if isinstance(task, tuple) else (task, 1.0) for task in tasks]
        self.name = name
        self.seed = seed
        self.tasks = [task for task, _ in pairs]
        self.counts = [round(len(task) * repeats) for task, repeats in pairs]
        self._starts = [0, *accumulate(self.counts)]
        self._order = array("Q", range(self._starts[-1]))  # 8 bytes a row: mixtures run to millions of rows
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def row(self, index: int) -> Conversation:
        position = self._order[index]
        which = bisect_right(self._starts, position) - 1
        task = self.tasks[which]
        return task[(position - self._starts[which]) % len(task)]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of its tasks, how often each is shown, and their order."""
        parts = [(task.fingerprint, count) for task, count in zip(self.tasks, self.counts, strict=True)]
        return hashlib.sha256(json.dumps([parts, self.seed]).encode()).hexdigest()

    def __str__(self) -> str:
        """A table: task, rows taken, share of the mixture."""
        rows = [(task.name, count) for task, count in zip(self.tasks, self.counts, strict=True)] + [
            ("total", len(self))
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {count:>9,} {count / max(len(self), 1):>6.1%}" for name, count in rows)


def final_text(reply: Reply) -> str:
    """What the reply says after its last tool call; a model that only calls the tool has said nothing."""
    if isinstance(reply, str):
        return reply
    last_output = max((i for i, part in enumerate(reply) if part["type"] != "text"), default=-1)
    return "".join(part["text"] for part in reply[last_output + 1 :])


# 1,234.5 or 1234.5 or .5; a minus sign belongs to the number unless it stands between two operands, as in 7-3.
_NUMBER = re.compile(r"(?:(?<![0-9)\w])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`, None if there is none."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
