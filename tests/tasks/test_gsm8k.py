from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import Part
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks.gsm8k import GSM8K, answer_parts, marked_answer, normalize_number
from nanochat.tasks.task import Reply
from tests.conftest import StartHub

ANSWER = "It is 48/2 = <<48/2=24>>24 now and 24+.5=$<<24+.50=24.50>>24.50 then.\n#### 24.5"


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def test_marks_become_tool_calls() -> None:
    assert answer_parts(ANSWER) == [
        text("It is 48/2 = "),
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        text("24 now and 24+.5=$"),
        {"type": "python", "text": "24+.50"},
        {"type": "python_output", "text": "24.5"},
        text("24.50 then.\n#### 24.5"),
    ]
    assert answer_parts("Seven.\n#### 7") == [text("Seven.\n#### 7")]


@pytest.mark.parametrize(
    ("written", "by_the_tool"),
    [("20.00", "20"), (".5", "0.5"), ("+7", "7"), ("1,200", "1200"), ("1000", "1000"), ("-3", "-3"), ("3/4", "3/4")],
)
def test_results_are_written_as_the_tool_does(written: str, by_the_tool: str) -> None:
    assert normalize_number(written) == by_the_tool


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("#### 72", "72"),
        ("so 5.\n#### $1,200.50", "1200.5"),
        ("#### 1\n#### 2", "2"),
        ("####-3\nand 4 more", "-3"),
        ("72", None),
        ("####", None),
        ("#### none", None),
    ],
)
def test_the_answer_is_what_follows_the_mark(reply: str, number: str | None) -> None:
    assert marked_answer(reply) == (None if number is None else Decimal(number))


@pytest.mark.usefixtures("base_dir")
def test_answers_become_tool_calls_that_are_graded_right(start_hub: StartHub) -> None:
    start_hub()
    task = GSM8K("train")
    for row in task:
        assert find_problem(row) is None
        reference: Reply = row["messages"][1]["content"]
        assert [part["type"] for part in reference if isinstance(part, dict)].count("python") == 2
        assert task.grade(row, reference) == 1.0
        assert task.grade(row, "#### 0.25") == 0.0


@pytest.mark.usefixtures("base_dir")
def test_the_real_set(start_hub: StartHub, real_data: Path) -> None:
    start_hub("--root", real_data)
    train, test = GSM8K("train"), GSM8K("test")
    assert (len(train), len(test)) == (7473, 1319)
    assert not {str(row["messages"][0]) for row in train} & {str(row["messages"][0]) for row in test}
    calls: list[tuple[str, str]] = []
    for task in (train, test):
        for row in task:
            assert find_problem(row) is None
            reference: Reply = row["messages"][1]["content"]
            assert task.grade(row, reference) == 1.0
            assert isinstance(reference, list) and "<<" not in str(reference)
            calls += [
                (call["text"], output["text"]) for call, output in pairwise(reference) if call["type"] == "python"
            ]
    with Calculator(max_workers=1) as calculator:
        results = [(calculator.run(call), output) for call, output in calls[::100]]
    assert len(results) > 250
    # The dataset rounds here and there, as in 1/3=.33; most results are exactly what the tool gives.
    assert sum(result == output for result, output in results) > 0.97 * len(results)
    assert train.grade(train[0], "#### 0.5") == 0.0
