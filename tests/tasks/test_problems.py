"""Problems of the user's own: every grader, and files that are refused before a run starts."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from nanochat import conversation_files
from nanochat.conversation_files import convert
from nanochat.errors import UserError
from nanochat.tasks import problems
from nanochat.tasks.mixtures import load_mixture, load_task
from nanochat.tasks.problems import Problems
from nanochat.tasks.task import GradedTask, score
from tests.tasks.test_task import Squares

pytestmark = pytest.mark.usefixtures("base_dir")
TASK = """
from nanochat.conversations import conversation
from nanochat.tasks.task import GradedTask, final_text

class Backwards(GradedTask):
    name = "backwards"
    def __init__(self, split):
        self.words = ["tac", "god"] if split == "train" else ["xof"]
    def __len__(self):
        return len(self.words)
    def __getitem__(self, index):
        return conversation(f"Reverse {self.words[index]}", self.words[index][::-1])
    def grade(self, conversation, reply):
        return float(final_text(reply) == conversation["messages"][-1]["content"])
"""


def problem(grader: object, answer: object = "42", rule: object = None) -> dict[str, Any]:
    row = {"question": "What?", "answer": answer, "grader": grader}
    return row if rule is None else row | {"rule": rule}


@pytest.mark.parametrize(
    ("row", "reply", "grade"),
    [
        (problem("exact"), " 42\n", 1),
        (problem("exact"), "It is 42", 0),
        (problem("contains", "Paris"), "It is PARIS.", 1),
        (problem("contains", "Paris"), "It is Rome.", 0),
        (problem("number", 42), "6 * 7 = 42.0", 1),
        (problem("number"), "42 is 43", 0),
        (problem("number"), "none", 0),
        (problem("regex", "In 1969.", r"\b19\d9\b"), "1969 it was", 1),
        (problem("regex", "In 1969.", r"\b19\d9\b"), "11969", 0),
        (problem("regex", r"^4+2$"), "442", 1),
        (problem("python", "7", "int(reply) in (2, 3, 5, 7)"), "5", 1),
        (problem("python", "7", "int(reply) in (2, 3, 5, 7)"), "6", 0),
        (problem("python", "abcd", "1 - abs(len(reply) - len(answer)) / 4"), "abc", 0.75),
        (problem("python", "int(reply) > 3"), "4", 1),
        (problem("python", "7", "int(reply) > 3"), "seven", 0),  # fails: wrong
        (problem("python", "7", "10 if reply == 'x' else 1"), "x", 0),  # not a grade
        (problem("regex", "a", "^(a+)+$"), "a" * 2000 + "b", 0),
    ],
)
def test_graders(row: dict[str, Any], reply: str, grade: float) -> None:
    assert problems.find_problem(convert(row)) is None
    task = Problems("mine", [convert(row)])
    assert score(task, task[0], reply) == grade
    parts = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}, {"type": "text", "text": reply}]
    assert score(task, task[0], parts) == grade  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (problem("magic"), "exact, contains, number, regex, python"),
        (problem(["exact"]), "exact, contains, number, regex, python"),
        (problem(None), "exact, contains, number, regex, python"),
        (problem("regex", "x", 7), 'a "rule" that is text'),
        (problem("number", "many"), "number, rejects its own answer"),
        (problem("regex", "x", "("), "regex, failed"),
        (problem("regex", "("), "regex, failed"),
        (problem("python", "7", "reply ="), "python, failed"),
        (problem("python", "reply ="), "python, failed"),
        (problem("python", "7", "nothing(reply)"), "NameError"),
        (problem("python", "7", "open('/etc/passwd').read()"), "python, failed"),
        (problem("python", "7", "while True: pass"), "python, failed (took longer"),
        (problem("python", "7", "reply == 'seven'"), "python, rejects its own answer"),
        ({"messages": [{"role": "user", "content": "a"}], "grader": "exact"}, "needs an answer"),
    ],
)
def test_a_grader_that_rejects_its_own_answer_is_found(row: dict[str, Any], reason: str) -> None:
    assert reason in str(problems.find_problem(convert(row)))


def test_a_file_names_its_broken_line(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (problem("exact"), problem("number", "x"))))
    with pytest.raises(UserError, match=r"line 2 of .*problems.jsonl is invalid .*number"):
        load_mixture("rl", [str(file)], only=True)
    assert len(conversation_files.read(file)) == 2  # but they are conversations to learn from


def test_a_mixture_grades_each_row_with_its_own_task(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem("exact", f"{i}!")) + "\n" for i in range(4)))
    mixture = load_mixture("rl", [str(file), "arithmetic:4 rows"], only=True)
    rows = [mixture.locate(i) for i in range(len(mixture))]
    assert {type(task).__name__ for task, _ in rows} == {"Problems", "Arithmetic"}
    assert all(score(task, row, row["messages"][-1]["content"]) == 1 for task, row in rows)


def test_a_failing_grader_costs_one_line_and_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Squares):
        def grade(self, conversation: object, reply: object) -> float:
            raise ZeroDivisionError("bad\nluck")

    task = Broken(3)
    assert [score(task, task[i], "9") for i in range(3)] == [0, 0, 0]
    assert capsys.readouterr().out.splitlines() == [
        "note: the grader of squares failed (ZeroDivisionError: bad luck), counted as wrong"
    ]


def test_a_python_file_defines_one_task(tmp_path: Path) -> None:
    file = tmp_path / "backwards.py"
    file.write_text(TASK)
    task = load_task(str(file), graded=True)
    assert isinstance(task, GradedTask) and len(task) == 2
    assert len(load_task(str(file), graded=True, split="test")) == 1
    before = task.fingerprint
    file.write_text(TASK.replace("float(", "0.5 * float("))
    assert load_task(str(file), graded=True).fingerprint != before  # results of the old grader are not reused
    assert load_mixture("rl", [f"{file}:2"], only=True).counts == [4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("class", "clas"), "SyntaxError"),
        (("reply) ==", "replay) =="), r"failed in line 14 \(NameError: .*replay"),
        (("(GradedTask)", ""), "must define one class"),
        (("def grade", "def mark"), "must define one class"),
        (("split", "words"), "TypeError: .*words"),
        (('"train"', '"none"'), "IndexError"),
        (("conversation(f", "str(f"), "decoding str is not supported|not a conversation"),
    ],
)
def test_a_python_file_that_fails_is_a_user_error(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    file = tmp_path / "backwards.py"
    text = TASK.replace(*change)
    file.write_text(text.replace('["xof"]', "[]") if "IndexError" in reason else text)
    with pytest.raises(UserError, match=reason):
        load_task(str(file), graded=True)


def test_the_example_of_the_documents_is_valid(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "docs" / "example_data.py"
    runpy.run_path(str(example))["main"](tmp_path)
    chats, held_out = (conversation_files.read(tmp_path / f"chats{part}.jsonl") for part in ("", "-held-out"))
    asked, tested = (
        {str(row["messages"][0]["content"]) for row in conversation_files.read(tmp_path / name, problems.find_problem)}
        for name in ("problems.jsonl", "problems-held-out.jsonl")
    )
    assert len(chats) == 200 and len(held_out) == 40 and not asked & tested


def test_a_missing_python_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FileNotFoundError"):
        load_task(str(tmp_path / "absent.py"), graded=True)
