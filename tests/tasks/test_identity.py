import json
import re
from pathlib import Path

import pytest

from nanochat import conversation_files
from nanochat.conversation_files import find_problem
from nanochat.conversations import Conversation, conversation, text_of
from nanochat.data import demo_data
from nanochat.tasks import identity
from nanochat.tasks.identity import HELD_OUT_QUESTIONS, IdentityQuestions, default_conversations
from nanochat.tasks.task import load_wording


def letters(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def test_hundreds_of_distinct_valid_conversations() -> None:
    rows = default_conversations()
    assert len({json.dumps(row) for row in rows}) == len(rows) >= 500
    assert not [row for row in rows if find_problem(row)]
    assert {len(row["messages"]) for row in rows} == {2, 4}
    assert rows == default_conversations()


def leaks(rows: list[Conversation]) -> list[str]:
    turns = [text_of(message) for row in rows for message in row["messages"]]
    held_out = [letters(question) for question in HELD_OUT_QUESTIONS]
    return [turn for turn, plain in zip(turns, map(letters, turns), strict=True) if any(q in plain for q in held_out)]


def test_held_out_questions_are_in_no_training_conversation() -> None:
    assert len(HELD_OUT_QUESTIONS) == 5
    assert leaks([conversation("hello, WHO are you", "nanochat")])
    assert not leaks(default_conversations())
    assert not leaks(demo_data.chitchat("train"))


def test_every_answer_to_who_it_is_has_the_name() -> None:
    for topic in load_wording("identity")["topics"]:
        if any("name" in question or question.startswith("Who ex") for question in topic["questions"]):
            assert all("nanochat" in answer for answer in topic["answers"])


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("I am nanochat.", 1.0), ("NanoChat!", 1.0), ("I am a model.", 0.0), ("nanochatter", 0.0), ("", 0.0)],
)
def test_the_reply_must_contain_the_name(reply: str, grade: float) -> None:
    task = IdentityQuestions()
    assert len(task) == 5
    assert all(task.grade(row, reply) == grade for row in task)
    assert all(task.grade(row, text_of(row["messages"][1])) == 1.0 for row in task)


def test_the_user_s_file_is_made_once_and_read_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "identity.jsonl"
    assert identity.write_default(path)
    assert conversation_files.read(path) == default_conversations()
    mine = conversation("Who built you?", "Ada did.")
    path.write_text(json.dumps(mine) + "\n")
    assert not identity.write_default(path)
    assert conversation_files.read(path) == [mine]
