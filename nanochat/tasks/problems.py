"""Problems of the user's own, for RL and evaluation: a file of questions with answers and graders, or a Python class.

    {"question": "How many meters are 3 km?", "answer": "3000", "grader": "number"}
    {"question": "When did people first land on the moon?", "answer": "In 1969.", "grader": "contains", "rule": "1969"}
    {"question": "Name a prime number.", "answer": "7", "grader": "python", "rule": "int(reply) in (2, 3, 5, 7)"}

`rule` is what the grader compares with, by default the answer. Any format that nanochat.conversation_files reads may
have a grader.
"""

import ast
import hashlib
import inspect
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path

from nanochat import conversation_files
from nanochat.conversations import Conversation
from nanochat.errors import UserError, one_line
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks.task import ConversationList, GradedTask, Reply, Split, Task, final_text, last_number

CALCULATOR = Calculator()  # limits time and memory; starts at the first call


def _evaluate(code: str, reply: str, answer: str) -> float:
    value = CALCULATOR.run(f"import re\nreply, answer = {reply!r}, {answer!r}\n{code}")
    if value.startswith("error: "):
        raise ValueError(value.removeprefix("error: "))
    return float({"True": "1", "False": "0"}.get(value, value))


GRADERS: dict[str, Callable[[str, str, str], float]] = {
    "exact": lambda rule, reply, answer: reply == rule,
    "contains": lambda rule, reply, answer: rule.casefold() in reply.casefold(),
    "number": lambda rule, reply, answer: last_number(reply) == last_number(rule) is not None,
    "regex": lambda rule, reply, answer: _evaluate(f"bool(re.search({rule!r}, reply))", reply, answer),
    "python": _evaluate,
}
"""Grade a reply by a rule. `number` compares the last numbers, `python` takes an expression of `reply` and `answer`."""


class Problems(ConversationList, GradedTask):
    """Conversations with graders, which get replies without tool calls and surrounding white space."""

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """Raises ValueError if the rule fails on this reply."""
        answer = final_text(conversation["messages"][-1]["content"]).strip()
        rule = conversation.get("rule", answer)
        return GRADERS[conversation["grader"]](rule, final_text(reply).strip(), answer)


def find_problem(conversation: Conversation) -> str | None:
    """Return the reason why replies cannot be graded, or None: a grader must accept the answer given with it."""
    grader, rule, answer = conversation.get("grader"), conversation.get("rule", ""), conversation["messages"][-1]
    if str(grader) not in GRADERS or not isinstance(rule, str) or answer["role"] != "assistant":
        return f'it needs an answer, a "grader" ({", ".join(GRADERS)}) and, if given, a "rule" that is text'
    try:
        if grader == "python" and not rule:  # the answer is the rule, so that there is no reply to try it on
            ast.parse(final_text(answer["content"]).strip())
            return None
        grade = Problems("", []).grade(conversation, answer["content"])
        accepted = grade > 0 or (grader == "regex" and not rule)
        return None if accepted else f"its grader, {grader}, rejects its own answer"
    except (ValueError, SyntaxError) as error:
        return f"its grader, {grader}, failed ({error})"


def load_python(path: Path, split: Split) -> Task:
    """Create the task whose class is defined in a Python file, with the argument `split` if it takes one.

    Raises UserError if the file fails, does not define exactly one task, or if the task rejects its first row.
    """
    try:
        found = [c for c in runpy.run_path(str(path), run_name=path.stem).values() if isinstance(c, type)]
        classes = [c for c in found if c.__module__ == path.stem and issubclass(c, Task) and not inspect.isabstract(c)]
        if len(classes) != 1:
            raise UserError(f"{path} must define one class derived from Task or GradedTask, found {len(classes)}")
        task: Task = classes[0](**({"split": split} if "split" in inspect.signature(classes[0]).parameters else {}))
        if problem := conversation_files.find_problem(task[0]):
            raise UserError(f"{path}: row 0 is not a conversation ({problem})")
        if isinstance(task, GradedTask):
            task.grade(task[0], task[0]["messages"][-1]["content"])
        task.fingerprint = hashlib.sha256(path.read_bytes() + task.fingerprint.encode()).hexdigest()
        return task
    except UserError:
        raise
    except Exception as error:
        lines = [f" in line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        raise UserError(f"{path} failed{''.join(lines[-1:])} ({one_line(error)}): fix it") from error
