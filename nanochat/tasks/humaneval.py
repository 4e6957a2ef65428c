"""HumanEval: write Python functions from their docstrings (https://arxiv.org/abs/2107.03374).

The model's code runs in nanochat.sandbox.runner, in a process without access to files, the network or the tests.
"""

import re
from typing import ClassVar

from nanochat.conversations import Conversation, conversation, text_of
from nanochat.sandbox.runner import check_sandbox, run_program
from nanochat.tasks.hub_task import HubTask
from nanochat.tasks.task import GradedTask, Reply, final_text

INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."
_CODE_BLOCK = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class HumanEval(HubTask, GradedTask):
    """164 problems for evaluation only, graded by the problem's tests."""

    name = "humaneval"
    REPOSITORY = "openai/openai_humaneval"
    FILES: ClassVar = {"test": ["openai_humaneval/test-00000-of-00001.parquet"]}

    def __init__(self, *, unconfined: bool = False) -> None:
        """`unconfined` runs the model's code even if the kernel cannot sandbox it.

        Raises UserError if a correct program would not pass.
        """
        check_sandbox(unconfined=unconfined)
        super().__init__("test")
        self.unconfined = unconfined
        self._by_question = {question(row["prompt"]): row for row in self._table.to_pylist()}

    def __getitem__(self, index: int) -> Conversation:
        row = self.source(index)
        solution = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
        return conversation(question(row["prompt"]), solution)

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the tests pass, else 0.0. Raises UserError if the code cannot be sandboxed, unless `unconfined`."""
        row = self._by_question[text_of(conversation["messages"][-2])]
        name = row["entry_point"]
        program = function(row["prompt"], name, final_text(reply))
        tests = f"{row['prompt']}\n{row['test']}\n{name} = candidate\ncheck({name})\n"  # tests use the prompt's helpers
        return float(run_program(program, tests, name, unconfined=self.unconfined).passed)


def question(prompt: str) -> str:
    return f"{INSTRUCTION}\n\n```python\n{prompt.strip()}\n```"


def function(prompt: str, name: str, reply: str) -> str:
    """Extract the function from a reply, in a code block or plain. A body alone continues the prompt."""
    block = _CODE_BLOCK.search(reply)
    code = block[1] if block else reply
    definition = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    if not definition.search(code):
        return prompt + code
    before = definition.split(prompt)[0]  # imports and helper functions
    return before + code
