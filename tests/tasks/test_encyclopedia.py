import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import text_of
from nanochat.data import demo_data
from nanochat.tasks.encyclopedia import MAX_ANSWER_CHARS, Encyclopedia, first_sentences


def test_answers_are_short_beginnings_of_train_articles() -> None:
    held_out = {first_sentences(article.extract) for article in demo_data.articles("val")}
    task = Encyclopedia()
    assert len(task) > 8000
    for row in list(task)[::7]:
        answer = text_of(row["messages"][1])
        assert find_problem(row) is None
        assert len(answer) <= MAX_ANSWER_CHARS
        assert answer not in held_out


def test_people_are_asked_for_with_who() -> None:
    task = Encyclopedia()
    asked = {text_of(row["messages"][0]) for row in task}
    assert not [question for question in asked if question.startswith(("What is Max Born", "Who was a "))]
    assert any(question.startswith("Who was ") for question in asked)
    assert any(question.startswith("Who is ") for question in asked)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A hat is worn. It is old.", "A hat is worn. It is old."),
        (
            "J. S. Bach lived in St. Thomas c. 1723. He wrote. More.",
            "J. S. Bach lived in St. Thomas c. 1723. He wrote.",
        ),
        ("It is 3.5 m long. A" + "x" * 300 + ".", "It is 3.5 m long."),
        ("One. Two.\nThree.", "One. Two."),
    ],
)
def test_first_sentences(text: str, first: str) -> None:
    assert first_sentences(text) == first
