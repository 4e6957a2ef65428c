"""Base classes of the tasks: conversations to train on and, for graded tasks, to score replies with."""

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from nanochat.conversations import Conversation, Part
from nanochat.errors import UserError, one_line

DATA = Path(__file__).parent / "data"  # wording of the generated tasks, to be edited: JSON and JSON Lines

Split = Literal["train", "test"]
Reply = str | list[Part]


def load_wording(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


class Task(ABC):
    """Conversations by index, each ending with its reference answer. An index always returns the same conversation.

    The train and test splits of a task never share a problem: a hash of the problem itself decides
    (nanochat.data.split.held_out), not its order, a seed or the size.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Conversation:
        """Return the conversation at 0 <= index < len(self), in constant time."""

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def locate(self, index: int) -> "tuple[Task, Conversation]":
        """Return the conversation at `index` with the task that grades it, which differs in a mixture."""
        return self, self[index]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all conversations."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


class GradedTask(Task):
    failed = False  # `grade` has raised an exception

    @abstractmethod
    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """Score `reply` as the last turn of `conversation`, from 0.0 (wrong) to 1.0 (right)."""


class NumberTask(GradedTask):
    """A task whose answer is the last number of the reply."""

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the last number of the reply's final text equals the reference's exactly, else 0.0."""
        expected = last_number(final_text(conversation["messages"][-1]["content"]))
        return float(expected is not None and last_number(final_text(reply)) == expected)


class ConversationList(Task):
    def __init__(self, name: str, conversations: Sequence[Conversation]) -> None:
        self.name = name
        self._conversations = conversations

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self._conversations[index]


class Mixture(Task):
    """Several tasks as one, shuffled. Repeats of 2.0 use every row of a task twice; 0.5 uses its first half once."""

    def __init__(
        self,
        tasks: Sequence[Task | tuple[Task, float]],
        seed: int = 0,
        name: str = "mixture",
        lines: Sequence[str] | None = None,
    ) -> None:
        """`lines`: the tasks as listed in a file, which `str` returns with the number of rows of each."""
        pairs = [task if isinstance(task, tuple) else (task, 1.0) for task in tasks]
        self.name, self.seed = name, seed
        self.lines = lines or [f"{task.name}: {repeats:g}" for task, repeats in pairs]
        self.tasks = [task for task, _ in pairs]
        self.counts = [round(len(task) * repeats) for task, repeats in pairs]
        self._starts = [0, *accumulate(self.counts)]
        self._order = array("Q", range(self._starts[-1]))  # 8 bytes per row: mixtures have millions of rows
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        return self.locate(index)[1]

    def locate(self, index: int) -> tuple[Task, Conversation]:
        position = self._order[index]
        which = bisect_right(self._starts, position) - 1
        task = self.tasks[which]
        return task.locate((position - self._starts[which]) % len(task))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tasks' fingerprints, their row counts and the seed."""
        parts = [(task.fingerprint, count) for task, count in zip(self.tasks, self.counts, strict=True)]
        return hashlib.sha256(json.dumps([parts, self.seed]).encode()).hexdigest()

    def __str__(self) -> str:
        width = max(map(len, self.lines))
        counts = (f"# {count:>9,} {count / max(len(self), 1):>6.1%}" for count in self.counts)
        rows = (f"  {line:<{width}}  {count}" for line, count in zip(self.lines, counts, strict=True))
        return "\n".join([f"{self.name}:", *rows, f"  {'':<{width}}  # {len(self):>9,} 100.0%"])


def score(task: Task, conversation: Conversation, reply: Reply) -> float:
    """Grade a reply with a GradedTask; 0.0 if the grader fails, so that one odd reply does not end a run of hours."""
    assert isinstance(task, GradedTask)
    try:
        if 0 <= (grade := float(task.grade(conversation, reply))) <= 1:
            return grade
        raise ValueError(f"a grade must be between 0 and 1, got {grade}")
    except UserError:
        raise
    except Exception as error:
        if not task.failed:
            print(f"note: the grader of {task.name} failed ({one_line(error)}), counted as wrong", flush=True)
        task.failed = True
        return 0.0


def final_text(reply: Reply) -> str:
    """Return the text after the last tool call; empty if the reply ends with a tool call."""
    if isinstance(reply, str):
        return reply
    last_output = max((i for i, part in enumerate(reply) if part["type"] != "text"), default=-1)
    return "".join(part["text"] for part in reply[last_output + 1 :])


# 1,234.5 or 1234.5 or .5; a minus sign belongs to the number unless it stands between two operands, as in 7-3.
_NUMBER = re.compile(r"(?:(?<![0-9)\w])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """Return the last number in `text`, or None."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
