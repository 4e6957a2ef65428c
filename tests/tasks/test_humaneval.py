from pathlib import Path

import pytest

from nanochat.conversation_files import find_problem
from nanochat.sandbox.runner import missing_protection
from nanochat.tasks.humaneval import HumanEval, function
from tests.conftest import StartHub

PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef area(r):\n    """Area of a circle."""\n'
BODY = "    return math.pi * helper(r) ** 2\n"
WHOLE = "def area(r):\n    return math.pi * helper(r) ** 2"


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        BODY,
        f"Here it is:\n```python\n{WHOLE}\n```\nIt squares the radius.",
        f"```\n{WHOLE}\n```",
        f"```python\n{PROMPT}{BODY}```",
        f"```python\n{WHOLE}",
        f"```python\n{BODY}\n```",
    ],
)
def test_the_function_is_found_in_the_reply(reply: str) -> None:
    scope: dict[str, object] = {}
    exec(function(PROMPT, "area", reply), scope)
    area = scope["area"]
    assert callable(area) and round(area(1.0), 4) == 3.1416


@pytest.mark.usefixtures("base_dir")
@pytest.mark.skipif(missing_protection() is not None, reason=f"{missing_protection()}")
def test_reference_solutions_pass_and_others_do_not(start_hub: StartHub) -> None:
    start_hub()
    task = HumanEval()
    assert not [row for row in task if find_problem(row)]
    for row in list(task)[::2]:
        reference = row["messages"][-1]["content"]
        assert task.grade(row, reference) == 1.0
        assert task.grade(row, "    return None") == 0.0
        assert task.grade(row, "import sys; sys.exit(0)") == 0.0
    assert "return" not in str(task[0]["messages"][-2]["content"]).split('"""')[-1]


@pytest.mark.usefixtures("base_dir")
@pytest.mark.skipif(missing_protection() is not None, reason=f"{missing_protection()}")
def test_the_real_problems(start_hub: StartHub, real_data: Path) -> None:
    start_hub("--root", real_data)
    task = HumanEval()
    assert len(task) == 164
    assert not [row for row in task if find_problem(row)]
    for row in list(task)[::16]:
        assert task.grade(row, row["messages"][-1]["content"]) == 1.0
        assert task.grade(row, "    return None") == 0.0
