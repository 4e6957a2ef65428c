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
    question: str
    choices: Sequence[str]
    answer: int  # index into choices


def multiple_choice(row: Choices) -> Conversation:
    """Format the question with one lettered choice per line; the answer is the letter."""
    lines = (f"{letter}) {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False))
    return conversation("\n".join((row.question, *lines, INSTRUCTION)), LETTERS[row.answer])


class CategoricalTask(HubTask, GradedTask):
    """Multiple choice, scored by the most likely of `letters` after the prompt, or by a generated reply.

    A letter starts its line, so that no space or symbol is merged with it: it is the same token in the question and as
    the reply, and picking a choice is copying a token.
    """

    @abstractmethod
    def choices(self, index: int) -> Choices:
        """Parse row `index`."""

    def row(self, index: int) -> Conversation:
        return multiple_choice(self.choices(index))

    def letters(self, index: int) -> str:
        """Letters of the choices of row `index`, such as ABCD."""
        return LETTERS[: len(self.choices(index).choices)]

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply starts with the right letter as a word, else 0.0."""
        found = _LETTER_ALONE.match(final_text(reply).strip())
        return float(found is not None and found[1] == conversation["messages"][-1]["content"])
