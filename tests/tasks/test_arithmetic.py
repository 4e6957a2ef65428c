import re

import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import Conversation, Part, text_of
from nanochat.tasks.arithmetic import Arithmetic, ToolProblems, WordProblems, canonical
from nanochat.tasks.task import Split

TASKS = [Arithmetic, WordProblems]


def parts(row: Conversation) -> list[Part]:
    content = row["messages"][-1]["content"]
    assert isinstance(content, list)
    return content


@pytest.mark.parametrize("task_class", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_is_solved_by_its_tool_call(task_class: type[ToolProblems], split: Split) -> None:
    for row in task_class(split, 1000):
        assert find_problem(row) is None
        call, output, text = parts(row)
        assert [call["type"], output["type"], text["type"]] == ["python", "python_output", "text"]
        assert str(eval(call["text"])) == output["text"]
        assert text["text"].endswith(f" {output['text']}.")


@pytest.mark.parametrize("task_class", TASKS)
def test_the_call_has_the_question_s_numbers_in_order(task_class: type[ToolProblems]) -> None:
    for row in task_class("train", 1000):
        numbers = re.findall(r"\d+", parts(row)[0]["text"])
        assert re.findall(r"\d+", text_of(row["messages"][0])) == numbers


def test_train_and_test_share_no_expression_over_both_tasks() -> None:
    train = {canonical(parts(row)[0]["text"]) for task in TASKS for row in task("train", 3000)}
    test = {canonical(parts(row)[0]["text"]) for task in TASKS for row in task("test", 1000)}
    assert len(test) > 500
    assert not train & test


@pytest.mark.parametrize("task_class", TASKS)
def test_rows_do_not_depend_on_the_size(task_class: type[ToolProblems]) -> None:
    assert task_class("test", 10)[7] == task_class("test", 1000)[7]
    assert task_class("test", 10)[7] != task_class("test", 10)[8]


@pytest.mark.parametrize("task_class", TASKS)
def test_questions_are_varied(task_class: type[ToolProblems]) -> None:
    wordings = {re.sub(r"\d+", "#", text_of(row["messages"][0])) for row in task_class("train", 2000)}
    assert len(wordings) > 150


def test_word_problems_have_answers_above_zero() -> None:
    assert min(int(parts(row)[1]["text"]) for row in WordProblems("train", 2000)) > 0


@pytest.mark.parametrize("task_class", TASKS)
def test_grade(task_class: type[ToolProblems]) -> None:
    task = task_class("test", 10)
    for row in task:
        result = parts(row)[1]["text"]
        assert task.grade(row, parts(row)) == 1.0
        assert task.grade(row, f"I think it is {result}") == 1.0
        assert task.grade(row, f"It is {int(result) + 1}.") == 0.0
        assert task.grade(row, f"{result}, or rather 123456") == 0.0
        assert task.grade(row, parts(row)[:2]) == 0.0  # the tool's output alone is not an answer
        assert task.grade(row, "I do not know.") == 0.0


def test_canonical_ignores_the_order_of_what_is_added_or_multiplied() -> None:
    assert canonical("37 + 45") == canonical("45+37")
    assert canonical("7 * (3 + 5)") == canonical("(5 + 3) * 7")
    assert len({canonical(e) for e in ("8 - 3", "3 - 8", "8 + 3", "8 * 3", "8 // 3")}) == 5
