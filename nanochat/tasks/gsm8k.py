"""GSM8K: grade school mathematics in words, reasoned step by step (https://arxiv.org/abs/2110.14168).

Its answers mark what was calculated, as in `48/2 = <<48/2=24>>24`, and end with `#### 24`. The marks become calls of
the python tool, whose result the text then repeats.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

from nanochat.conversations import Conversation, Part, conversation
from nanochat.tasks.hub_task import HubFiles, HubTask
from nanochat.tasks.task import GradedTask, Reply, final_text, last_number

REPOSITORY = "openai/gsm8k"
FILES = {split: HubFiles(REPOSITORY, [f"main/{split}-00000-of-00001.parquet"]) for split in ("train", "test")}
_MARK = re.compile(r"<<(.*?)=([^=>]*)>>")


class GSM8K(HubTask, GradedTask):
    """Graded on the number after the last ####, which has to be there."""

    name = "gsm8k"

    def __init__(self, split: Literal["train", "test"]) -> None:
        super().__init__(FILES[split])

    def row(self, index: int) -> Conversation:
        row = self.rows[index]
        return conversation(row["question"].strip(), answer_parts(row["answer"].strip()))

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply's number after #### equals the reference's, else 0.0."""
        expected = marked_answer(final_text(conversation["messages"][-1]["content"]))
        return float(expected is not None and marked_answer(final_text(reply)) == expected)


def marked_answer(text: str) -> Decimal | None:
    """The one number on the line after the last ####, None if there is none."""
    _, mark, after = text.rpartition("####")
    numbers = after.strip().splitlines()[0] if mark and after.strip() else ""
    return last_number(numbers)


def answer_parts(answer: str) -> list[Part]:
    """An answer with marks as text and tool calls."""
    parts: list[Part] = []
    at = 0
    for mark in _MARK.finditer(answer):
        if before := answer[at : mark.start()]:
            parts.append({"type": "text", "text": before})
        parts.append({"type": "python", "text": mark[1].strip()})
        parts.append({"type": "python_output", "text": as_the_tool_writes(mark[2])})
        at = mark.end()
    parts.append({"type": "text", "text": answer[at:]})
    return parts


def as_the_tool_writes(number: str) -> str:
    """A result without the zeros and signs that people write and Python does not: `.50` is `0.5`, `+7` is `7`."""
    try:
        return f"{Decimal(number.replace(',', '').strip()).normalize():f}"
    except InvalidOperation:
        return number.strip()
