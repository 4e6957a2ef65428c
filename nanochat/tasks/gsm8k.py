"""GSM8K: grade-school math word problems with step-by-step solutions (https://arxiv.org/abs/2110.14168).

The solutions annotate their calculations, as in `48/2 = <<48/2=24>>24`, and end with `#### 24`. Annotations become
calls of the python tool; the text then repeats the result.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import ClassVar

from nanochat.conversations import Conversation, Part, conversation
from nanochat.tasks.hub_task import HubTask
from nanochat.tasks.task import GradedTask, Reply, final_text, last_number

_CALCULATION = re.compile(r"<<(.*?)=([^=>]*)>>")


class GSM8K(HubTask, GradedTask):
    """Graded on the number after the last ####, which is required."""

    name = "gsm8k"
    REPOSITORY = "openai/gsm8k"
    FILES: ClassVar = {split: [f"main/{split}-00000-of-00001.parquet"] for split in ("train", "test")}

    def __getitem__(self, index: int) -> Conversation:
        row = self.source(index)
        return conversation(row["question"].strip(), answer_parts(row["answer"].strip()))

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        expected = marked_answer(final_text(conversation["messages"][-1]["content"]))
        return float(expected is not None and marked_answer(final_text(reply)) == expected)


def marked_answer(text: str) -> Decimal | None:
    """Return the number on the line after the last ####, or None."""
    _, mark, after = text.rpartition("####")
    return last_number(after.strip().splitlines()[0]) if mark and after.strip() else None


def answer_parts(answer: str) -> list[Part]:
    """Split an annotated solution into text and tool calls."""
    parts: list[Part] = []
    position = 0
    for match in _CALCULATION.finditer(answer):
        if before := answer[position : match.start()]:
            parts.append({"type": "text", "text": before})
        parts.append({"type": "python", "text": match[1].strip()})
        parts.append({"type": "python_output", "text": normalize_number(match[2])})
        position = match.end()
    parts.append({"type": "text", "text": answer[position:]})
    return parts


def normalize_number(number: str) -> str:
    """Format a number as Python prints it: `.50` becomes `0.5`, `+7` becomes `7`."""
    try:
        return f"{Decimal(number.replace(',', '').strip()).normalize():f}"
    except InvalidOperation:
        return number.strip()
