from decimal import Decimal

import pytest
import yaml

from nanochat.conversations import Conversation, Part, conversation
from nanochat.tasks.task import Mixture, NumberTask, Task, final_text, last_number


class Squares(NumberTask):
    name = "squares"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        return conversation(f"What is {index} squared?", f"{index} squared is {index**2}.")


def questions(task: Task) -> list[str]:
    return [str(row["messages"][0]["content"]) for row in task]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 82.", "82"),
        ("37 + 45 = 82", "82"),
        ("It is -5", "-5"),
        ("It is \N{MINUS SIGN}5.", "-5"),
        ("7-3", "3"),
        ("(7)-3", "3"),
        ("$1,234.50!", "1234.5"),
        ("1,234,567", "1234567"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("2.50 and .5", "0.5"),
        ("3.", "3"),
        ("82.0", "82"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_final_text_is_what_follows_the_last_tool_call() -> None:
    parts: list[Part] = [
        {"type": "text", "text": "Let me see 1."},
        {"type": "python", "text": "2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "It is "},
        {"type": "text", "text": "4."},
    ]
    assert final_text(parts) == "It is 4."
    assert final_text(parts[:3]) == ""
    assert final_text("plain") == "plain"


@pytest.mark.parametrize(
    ("reply", "grade"), [("9", 1.0), ("It is 9.0.", 1.0), ("9 or 10", 0.0), ("-9", 0.0), ("", 0.0)]
)
def test_a_number_task_grades_the_last_number(reply: str, grade: float) -> None:
    task = Squares(5)
    assert task.grade(task[3], reply) == grade


def test_a_mixture_holds_every_row_as_often_as_asked() -> None:
    mixture = Mixture([(Squares(10), 2.5), Squares(4)])
    found = questions(mixture)
    assert len(mixture) == len(found) == 29
    assert found.count("What is 2 squared?") == 4
    assert found.count("What is 4 squared?") == 3
    assert found.count("What is 5 squared?") == 2


def test_a_mixture_is_shuffled_by_its_seed_alone() -> None:
    first, again, other = (questions(Mixture([Squares(50), Squares(50)], seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert first[:50] != questions(Squares(50))


def test_a_mixture_prints_its_lines_with_counts() -> None:
    mixture = Mixture([(Squares(1000), 3), Squares(1000)], name="sft", lines=["squares: 3", "more.jsonl: 1"])
    assert str(mixture).splitlines() == [
        "sft:",
        "  squares: 3     #     3,000  75.0%",
        "  more.jsonl: 1  #     1,000  25.0%",
        "                 #     4,000 100.0%",
    ]
    assert yaml.safe_load(str(mixture)) == {"sft": {"squares": 3, "more.jsonl": 1}}
