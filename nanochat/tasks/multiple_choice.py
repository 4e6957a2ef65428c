"""Questions with lettered choices, answered with the letter alone: ARC and MMLU."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from nanochat.conversations import Conversation, conversation
from nanochat.tasks.hub_task import HubTask
from nanochat.tasks.task import GradedTask, Reply, Split, final_text

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

    A letter starts its line, so that no space or symbol is merged with it: it is the same token in the question and in
    the reply, so picking a choice means copying a token.
    """

    @abstractmethod
    def choices(self, index: int) -> Choices: ...

    def __getitem__(self, index: int) -> Conversation:
        return multiple_choice(self.choices(index))

    def letters(self, index: int) -> str:
        """Letters of the choices of row `index`, such as ABCD."""
        return LETTERS[: len(self.choices(index).choices)]

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply starts with the right letter as a word, else 0.0."""
        found = _LETTER_ALONE.match(final_text(reply).strip())
        return float(found is not None and found[1] == conversation["messages"][-1]["content"])


class ARC(CategoricalTask):
    """Science questions from school exams with three to five choices (https://arxiv.org/abs/1803.05457).

    The exams' labels, some of them 1 to 4, are replaced by letters in their order.
    """

    REPOSITORY = "allenai/ai2_arc"
    FILES: ClassVar = {
        (subset, split): [f"ARC-{subset}/{split}-00000-of-00001.parquet"]
        for subset in ("Easy", "Challenge")
        for split in ("train", "test")
    }

    def __init__(self, subset: Literal["Easy", "Challenge"], split: Split) -> None:
        self.name = f"arc {subset.lower()}"
        super().__init__((subset, split))

    def choices(self, index: int) -> Choices:
        row = self.source(index)
        answer = row["choices"]["label"].index(row["answerKey"])
        return Choices(row["question"].strip(), row["choices"]["text"], answer)


class MMLU(CategoricalTask):
    """Four choices, from 57 subjects (https://arxiv.org/abs/2009.03300).

    `train` is the auxiliary set: 100K questions from other exams, disjoint from `test`.
    """

    REPOSITORY = "cais/mmlu"
    FILES: ClassVar = {
        "train": ["auxiliary_train/train-00000-of-00001.parquet"],
        "test": ["all/test-00000-of-00001.parquet"],
    }

    def __init__(self, split: Split) -> None:
        self.name = "mmlu auxiliary" if split == "train" else "mmlu"
        super().__init__(split)

    def choices(self, index: int) -> Choices:
        row = self.source(index)
        row = row.get("train", row)  # the auxiliary file wraps each row in a struct of that name
        return Choices(row["question"].strip(), row["choices"], row["answer"])
