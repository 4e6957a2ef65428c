"""Arithmetic and word problems, solved with the python tool.

Every answer calls the tool first and repeats the numbers in the order in which the question gives them: a model of a
few million parameters learns to copy long before it learns to calculate.
"""

import ast
import random
from abc import abstractmethod

from nanochat.conversations import Conversation, Part, conversation
from nanochat.data.split import held_out
from nanochat.tasks.task import Mixture, NumberTask, Split, load_wording

TEST_SHARE = 0.1


class ToolProblems(NumberTask):
    """Random problems by index, each redrawn until its expression falls in the split."""

    answer: str  # a template of {expression} and {result}

    def __init__(self, split: Split, size: int = 10_000, start: int = 0) -> None:
        """`size` problems, numbered from `start`; stages with disjoint numbers share no rows."""
        self.split, self.size, self.start = split, size, start

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Draw a problem, regardless of split: the question, and the tool's input, such as `84 // 7`."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.split} {self.start + index}")
        question, expression = self.draw(rng)
        while held_out(canonical(expression), TEST_SHARE) != (self.split == "test"):
            question, expression = self.draw(rng)
        result = str(eval(expression))  # made of our own templates and numbers
        answer = self.answer.format(expression=expression.replace("//", "/"), result=result)
        parts: list[Part] = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": answer},
        ]
        return conversation(question, parts)


class Arithmetic(ToolProblems):
    """Sums, differences, products and exact quotients of whole numbers of up to three digits; some in two steps."""

    name = "arithmetic"
    answer = "{expression} = {result}."
    wording = load_wording("arithmetic")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        frames = self.wording["frames"]
        if rng.random() < 0.15:
            template = rng.choice(self.wording["two_steps"])
            expression = template.format(a=_number(rng, 2), b=_number(rng, 2), c=_number(rng, 2))
            frame = rng.choice(frames)
            return frame.format(expression if rng.random() < 0.5 else expression.replace(" ", "")), expression
        sign = rng.choice("+-*/")
        a, b = _operands(rng, sign)
        expression = f"{a} {sign} {b}"
        if rng.random() < 0.4 and a >= b:  # "the difference between 3 and 8" could mean either order
            question = rng.choice(self.wording["sentences"][sign]).format(a=a, b=b)
        else:
            symbol = rng.choice(self.wording["symbols"][sign])
            space = "" if len(symbol) == 1 and rng.random() < 0.3 else " "
            question = rng.choice(frames).format(f"{a}{space}{symbol}{space}{b}")
        return question, expression.replace("/", "//")


class WordProblems(ToolProblems):
    """Stories about things, money, distances and time; the answer is a whole number above zero.

    The stories use the numbers a > b, c, d and bc = b * c.
    """

    name = "word problems"
    answer = "The answer is {result}."
    wording = load_wording("word_problems")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        story = rng.choice(self.wording["stories"])
        name, other = rng.sample(self.wording["names"], 2)
        words = {"name": name, "other": other, "things": rng.choice(self.wording["things"])}
        words |= {"containers": rng.choice(self.wording["containers"]), "good": rng.choice(self.wording["goods"])}
        while True:
            b, c, d = rng.randint(2, 60), rng.randint(2, 12), rng.randint(2, 20)
            numbers = {"a": b + rng.randint(1, 140), "b": b, "c": c, "d": d, "bc": b * c}
            expression = story["expression"].format(**numbers)
            if eval(expression) > 0:
                return story["question"].format(**words, **numbers), expression


class Sums(Mixture, NumberTask):
    """Half arithmetic, half word problems; for RL and evaluation."""

    def __init__(self, split: Split, size: int, start: int = 0) -> None:
        halves = Arithmetic(split, size - size // 2, start), WordProblems(split, size // 2, start)
        super().__init__(halves, name="sums")


def _operands(rng: random.Random, sign: str) -> tuple[int, int]:
    if sign == "/":
        divisor = rng.randint(2, 99)
        return divisor * rng.randint(1, 999 // divisor), divisor
    a, b = _number(rng, 3), _number(rng, 3)
    if sign == "-" and rng.random() < 0.8:
        a, b = max(a, b), min(a, b)
    return a, b


def _number(rng: random.Random, max_digits: int) -> int:
    digits = rng.randint(1, max_digits)  # 1-digit numbers as often as 3-digit ones
    return rng.randrange(10 ** (digits - 1), 10**digits)


def canonical(expression: str) -> str:
    """Return one normal form for expressions that differ only in the order of their terms or factors.

    This is the key that splits train from test in both tasks: an expression of a test problem appears in no training
    problem of either.
    """

    def key(node: ast.expr) -> str:
        if not isinstance(node, ast.BinOp):
            return ast.unparse(node)
        sides = [key(node.left), key(node.right)]
        if isinstance(node.op, ast.Add | ast.Mult):
            sides.sort()
        return f"({sides[0]} {type(node.op).__name__} {sides[1]})"

    return key(ast.parse(expression, mode="eval").body)
