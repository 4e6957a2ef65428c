"""Sums solved with the python tool, and what they share with word problems.

Every answer calls the tool first and writes the numbers in the order in which the question gives them: a model
of a few million parameters learns to copy long before it learns to calculate.
"""

import ast
import operator
import random
from abc import abstractmethod
from typing import NamedTuple

from nanochat.conversations import Conversation, Part, conversation
from nanochat.data.splits import held_out
from nanochat.tasks.task import NumberTask, Split

TEST_SHARE = 0.1

FRAMES = (
    "What is {}?", "What's {}?", "How much is {}?", "What does {} equal?", "What is the value of {}?",
    "What do you get for {}?", "Tell me what {} is.", "Can you tell me what {} is?", "Do you know what {} is?",
    "Compute {}.", "Calculate {}.", "Work out {}.", "Solve {}.", "Evaluate {}.", "Find {}.", "Please calculate {}.",
    "Please work out {}.", "Can you compute {}?", "Can you calculate {} for me?", "Could you work out {} for me?",
    "I need the result of {}.", "Help me with {}.", "Hi! What is {}?", "Hello, how much is {}?",
    "Quick question: what is {}?", "what is {}", "calculate {}", "{}", "{}?", "{} =", "{} = ?",
)  # fmt: skip
SYMBOLS = {
    "+": ("+", "+", "plus"),
    "-": ("-", "-", "minus", "take away"),
    "*": ("*", "*", "x", "\N{MULTIPLICATION SIGN}", "times", "multiplied by"),
    "/": ("/", "/", "÷", "divided by"),
}
SENTENCES = {
    "+": (
        "Add {a} and {b}.", "Add {a} to {b}.", "What is the sum of {a} and {b}?", "Find the sum of {a} and {b}.",
        "What do {a} and {b} make together?", "What is the total of {a} and {b}?",
        "What do I get if I add {a} and {b}?",
        "What number is {a} plus {b}?",
    ),
    "-": (
        "What is the difference between {a} and {b}?", "Find the difference of {a} and {b}.",
        "What is left of {a} after taking away {b}?", "How much more is {a} than {b}?",
        "Start at {a} and subtract {b}.",
        "What is {a} reduced by {b}?", "By how much is {a} larger than {b}?",
    ),
    "*": (
        "Multiply {a} by {b}.", "Multiply {a} and {b}.", "What is the product of {a} and {b}?",
        "Find the product of {a} and {b}.", "What do I get if I multiply {a} by {b}?", "What are {a} groups of {b}?",
        "What number is {a} times {b}?",
    ),
    "/": (
        "Divide {a} by {b}.", "What is the quotient of {a} and {b}?", "Find the quotient of {a} and {b}.",
        "What do I get if I divide {a} by {b}?", "Split {a} into {b} equal parts. How big is each?",
        "What number is {a} divided by {b}?",
    ),
}  # fmt: skip
TWO_STEPS = (
    "{a} + {b} + {c}", "{a} + {b} - {c}", "{a} * ({b} + {c})", "({a} + {b}) * {c}", "{a} * {b} + {c}",
    "{a} + {b} * {c}",
)  # fmt: skip


class Problem(NamedTuple):
    question: str
    expression: str  # what the tool is asked, e.g. "84 // 7"
    answer: str  # with {result} where the result belongs


class ToolProblems(NumberTask):
    """Problems drawn by index, each redrawn until its expression falls into the split."""

    def __init__(self, split: Split, size: int = 10_000, first: int = 0) -> None:
        """`size` problems, numbered from `first`: stages that practise on other numbers share no row."""
        self.split = split
        self.size = size
        self.first = first

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """Any problem of this kind."""

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.split} {self.first + index}")
        problem = self.draw(rng)
        while held_out(canonical(problem.expression), TEST_SHARE) != (self.split == "test"):
            problem = self.draw(rng)
        result = str(evaluate(problem.expression))
        answer: list[Part] = [
            {"type": "python", "text": problem.expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": problem.answer.format(result=result)},
        ]
        return conversation(problem.question, answer)


class Arithmetic(ToolProblems):
    """Sums, differences, products and exact quotients of whole numbers of up to three digits; some in two steps."""

    name = "arithmetic"

    def draw(self, rng: random.Random) -> Problem:
        if rng.random() < 0.15:
            written = rng.choice(TWO_STEPS).format(a=_number(rng, 2), b=_number(rng, 2), c=_number(rng, 2))
            question = rng.choice(FRAMES).format(written if rng.random() < 0.5 else written.replace(" ", ""))
            return Problem(question, written, f"{written} = {{result}}.")
        sign = rng.choice("+-*/")
        a, b = _operands(rng, sign)
        written = f"{a} {sign} {b}"
        if rng.random() < 0.4 and a >= b:  # "the difference between 3 and 8" could mean either order
            question = rng.choice(SENTENCES[sign]).format(a=a, b=b)
        else:
            symbol = rng.choice(SYMBOLS[sign])
            space = "" if len(symbol) == 1 and rng.random() < 0.3 else " "
            question = rng.choice(FRAMES).format(f"{a}{space}{symbol}{space}{b}")
        return Problem(question, written.replace("/", "//"), f"{written} = {{result}}.")


def _operands(rng: random.Random, sign: str) -> tuple[int, int]:
    if sign == "/":
        divisor = rng.randint(2, 99)
        return divisor * rng.randint(1, 999 // divisor), divisor
    a, b = _number(rng, 3), _number(rng, 3)
    if sign == "-" and rng.random() < 0.8:
        a, b = max(a, b), min(a, b)
    return a, b


def _number(rng: random.Random, max_digits: int) -> int:
    """A whole number, each count of digits equally likely."""
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(expression: str) -> int:
    """The value of one of our own expressions: whole numbers, + - * // and brackets."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(_OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def canonical(expression: str) -> str:
    """One spelling for expressions that differ only in the order of what is added or multiplied.

    It is the key that splits train from test, for sums and word problems alike: what a test problem asks of the
    tool appears in no training problem of either kind.
    """

    def key(node: ast.expr) -> str:
        if not isinstance(node, ast.BinOp):
            return ast.unparse(node)
        sides = [key(node.left), key(node.right)]
        if isinstance(node.op, ast.Add | ast.Mult):
            sides.sort()
        return f"({sides[0]} {type(node.op).__name__} {sides[1]})"

    return key(ast.parse(expression, mode="eval").body)
