from pathlib import Path

import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import text_of
from nanochat.tasks.multiple_choice import ARC, LETTERS, MMLU, CategoricalTask
from nanochat.tokenizer import Tokenizer
from tests.conftest import StartHub

pytestmark = pytest.mark.usefixtures("base_dir")


def test_a_question_and_its_lettered_choices(start_hub: StartHub) -> None:
    start_hub()
    task = ARC("Easy", "train")
    row = task[1]
    assert text_of(row["messages"][0]) == (
        "Which is color number 1 of these?\nA) red\nB) green\nC) blue\nD) white\n"
        "Answer with the letter of the right choice."
    )
    assert row["messages"][1]["content"] == "B"
    assert task.letters(1) == "ABCD"


def test_the_auxiliary_rows_of_mmlu_are_unwrapped(start_hub: StartHub) -> None:
    start_hub()
    train, test = MMLU("train"), MMLU("test")
    for task in (train, test):
        assert not [row for row in task if find_problem(row)]
    assert text_of(train[0]["messages"][0]).startswith("What is 50 plus 2?\nA) 50\n")


def test_the_real_sets(start_hub: StartHub, real_data: Path) -> None:
    start_hub("--root", real_data)
    assert len(MMLU("test")) == 14042
    tasks: list[CategoricalTask] = [MMLU("test"), ARC("Easy", "test"), ARC("Challenge", "test")]
    for task in tasks:
        for i in range(0, len(task), 10):
            assert find_problem(task[i]) is None
            assert str(task[i]["messages"][1]["content"]) in task.letters(i)
            assert 3 <= len(task.letters(i)) <= 5


def test_every_answer_is_among_the_letters(start_hub: StartHub) -> None:
    start_hub()
    tasks: list[CategoricalTask] = [ARC("Easy", "test"), ARC("Challenge", "test"), ARC("Challenge", "train")]
    for task in tasks:
        for i in range(len(task)):
            assert str(task[i]["messages"][1]["content"]) in task.letters(i)
            assert 3 <= len(task.letters(i)) <= 5


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("B", 1.0), (" B\n", 1.0), ("B) a bacterial", 1.0), ("(B)", 1.0), ("B.", 1.0), ("A", 0.0), ("", 0.0),
     ("Because", 0.0), ("B is right", 0.0), ("The answer is B", 0.0), ("b", 0.0)],
)  # fmt: skip
def test_the_letter_is_graded(start_hub: StartHub, reply: str, grade: float) -> None:
    start_hub()
    task = ARC("Easy", "train")
    assert task.grade(task[1], reply) == grade


def test_a_letter_is_the_same_single_token_in_the_question_and_as_the_reply(
    start_hub: StartHub, tokenizer: Tokenizer
) -> None:
    start_hub()
    row = ARC("Easy", "train")[1]
    asked = tokenizer.encode(text_of(row["messages"][0]))
    for letter in LETTERS:
        assert len(tokenizer.encode(letter)) == 1
    assert [asked.count(tokenizer.encode(letter)[0]) for letter in "ABCD"] == [2, 1, 1, 1]  # A opens "Answer" too
