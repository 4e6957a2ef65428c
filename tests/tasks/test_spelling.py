from collections.abc import Callable

import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import Part, conversation
from nanochat.tasks.spelling import LetterCount, Spelling
from nanochat.tasks.task import GradedTask, final_text

WORDS = [a + b + c for a in "bcdfgst" for b in "aeiou" for c in ("ll", "nt", "st", "lls")]


def words_of(task: GradedTask) -> set[str]:
    return {word for row in task for word in WORDS if word in str(row).replace("-", "").replace("'", " ").split()}


@pytest.mark.parametrize("task_class", [Spelling, LetterCount])
def test_no_word_is_in_both_splits(task_class: Callable[..., GradedTask]) -> None:
    train, test = task_class(WORDS, "train"), task_class(WORDS, "test")
    assert len(train) + len(test) == len(WORDS)
    assert not words_of(train) & words_of(test)


def test_spelling_gives_the_letters_joined_by_hyphens() -> None:
    for row in Spelling(WORDS, "train", repeats=2):
        assert find_problem(row) is None
        word = final_text(row["messages"][1]["content"]).replace("-", "")
        assert word in WORDS and word in str(row["messages"][0]["content"])


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("a-p-p-l-e", 1.0),
        ("It is spelled a-p-p-l-e.", 1.0),
        ("a-p-l-e", 0.0),
        ("a-p-p-l-e-s", 0.0),
        ("a-p-p-l-e or a-p-l-e", 0.0),
        ("apple", 0.0),
        ("", 0.0),
    ],
)
def test_spelling_is_graded_letter_by_letter(reply: str, grade: float) -> None:
    assert Spelling(WORDS, "train").grade(conversation("Spell 'apple'.", "a-p-p-l-e"), reply) == grade


def test_letters_are_counted_with_the_tool() -> None:
    for row in LetterCount(WORDS, "train", repeats=3):
        content = row["messages"][1]["content"]
        assert find_problem(row) is None and isinstance(content, list)
        call, output, text = (part["text"] for part in content)
        assert str(eval(call)) == output
        assert f"appears {output} time{'' if output == '1' else 's'} in" in text


def test_letter_count_is_graded_by_its_number() -> None:
    task = LetterCount(["apple"], "train")
    reference: list[Part] = [{"type": "text", "text": "The letter 'p' appears 2 times in 'apple'."}]
    row = conversation("How many 'p' are in 'apple'?", reference)
    assert task.grade(row, reference) == 1.0
    assert task.grade(row, "2") == 1.0
    assert task.grade(row, "3") == 0.0
