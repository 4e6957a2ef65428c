"""Questions with lettered choices, answered with the letter alone."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from nanochat.conversations import Conversation, conversation
from nanochat.tasks.hub_task import HubTask
from nanochat.tasks.task import GradedTask, Reply, final_text

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Answer with the letter of the right choice."
_LETTER_ALONE = re.compile(r"\(?([A-J])(?:[).:]|$)")


class Choices(NamedTuple):
    """A question, what may be answered, and which of it is right."""

    question: str
    choices: Sequence[str]
    answer: int


def multiple_choice(row: Choices) -> Conversation:
    """The question with its lettered choices, a line each, answered with the letter."""
    lines = (f"{letter}) {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False))
    return conversation("\n".join((row.question, *lines, INSTRUCTION)), LETTERS[row.answer])


class CategoricalTask(HubTask, GradedTask):
    """Multiple choice. Scored by the likeliest of `letters` right after the prompt, or by a written reply.

    A letter opens its line, where no space or sign can be merged with it: it is the same single token there and as
    the reply, so that picking a choice is copying a token.
    """

    @abstractmethod
    def choices(self, index: int) -> Choices:
        """Row `index` taken apart."""

    def row(self, index: int) -> Conversation:
        return multiple_choice(self.choices(index))

    def letters(self, index: int) -> str:
        """The letters that row `index` leaves to choose from, such as ABCD."""
        return LETTERS[: len(self.choices(index).choices)]

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply opens with the right letter standing for itself, else 0.0."""
        found = _LETTER_ALONE.match(final_text(reply).strip())
        return float(found is not None and found[1] == conversation["messages"][-1]["content"])
