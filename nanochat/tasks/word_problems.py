"""Little stories of one or two steps, solved with the python tool."""

import random
from typing import NamedTuple

from nanochat.tasks.arithmetic import Problem, ToolProblems, evaluate

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kim", "Lena", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tara", "Umar", "Vera", "Will", "Yuki", "Zoe", "Amir", "Chen", "Fatima", "Ivan",
)  # fmt: skip
THINGS = (
    "apples", "books", "marbles", "stickers", "cards", "pencils", "shells", "coins", "stamps", "buttons", "cookies",
    "oranges", "balloons", "stones", "toys", "eggs", "flowers", "photos", "beads", "nuts", "pears", "tickets",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "baskets", "jars", "crates", "packs", "drawers", "trays")
GOODS = ("lamp", "book", "shirt", "hat", "chair", "ticket", "toy", "plant", "mug", "ball", "bag", "game")


class Story(NamedTuple):
    """A question and the expression that solves it, with the numbers a > b, c, d and bc, b times c."""

    question: str
    expression: str


STORIES = (
    Story("{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?", "{a} + {b}"),
    Story("{name} has {a} {things} and {other} has {b} {things}. How many do they have together?", "{a} + {b}"),
    Story("{name} found {b} {things} on Monday and {a} on Tuesday. How many {things} is that?", "{b} + {a}"),
    Story("There are {a} {things} on the table. {name} puts {b} more there. How many are on the table?", "{a} + {b}"),
    Story("A {good} costs ${a} and another costs ${b}. How many dollars do both cost together?", "{a} + {b}"),
    Story("{name} reads {b} pages today and {a} pages tomorrow. How many pages will {name} read?", "{b} + {a}"),
    Story("{name} is {b} years old. How old will {name} be in {c} years?", "{b} + {c}"),
    Story("A bus drives {a} km before lunch and {b} km after lunch. How many km does it drive?", "{a} + {b}"),
    Story("{name} has {a} {things} and gives {b} to {other}. How many {things} are left?", "{a} - {b}"),
    Story("{name} had {a} {things} and lost {b} of them. How many {things} does {name} still have?", "{a} - {b}"),
    Story("There were {a} {things} in the shop. {b} were sold. How many are left?", "{a} - {b}"),
    Story("{name} has ${a} and buys a {good} for ${b}. How many dollars does {name} have left?", "{a} - {b}"),
    Story("A book has {a} pages. {name} has read {b} of them. How many pages are still to read?", "{a} - {b}"),
    Story("{name} has {a} {things}, {other} has {b}. How many more does {name} have?", "{a} - {b}"),
    Story("A rope is {a} meters long. {name} cuts off {b} meters. How many meters remain?", "{a} - {b}"),
    Story("{a} people are on a train and {b} get off. How many people stay on it?", "{a} - {b}"),
    Story("{name} has {c} {containers} with {b} {things} in each. How many {things} is that?", "{c} * {b}"),
    Story("There are {b} {things} in one of the {containers}. How many are in {c} of them?", "{b} * {c}"),
    Story("A {good} costs ${b}. How many dollars do {c} of them cost?", "{b} * {c}"),
    Story("{name} earns ${b} an hour and works {c} hours. How many dollars does {name} earn?", "{b} * {c}"),
    Story("{name} walks {c} km every day. How many km does {name} walk in {b} days?", "{c} * {b}"),
    Story("A hall has {c} rows of {b} chairs. How many chairs are there?", "{c} * {b}"),
    Story("{name} reads {b} pages a day for {c} days. How many pages does {name} read?", "{b} * {c}"),
    Story("Each of {c} children brings {b} {things}. How many {things} do they bring?", "{c} * {b}"),
    Story("{name} shares {bc} {things} evenly among {c} friends. How many does each friend get?", "{bc} // {c}"),
    Story("{name} puts {bc} {things} evenly into {c} {containers}. How many are in each?", "{bc} // {c}"),
    Story("{name} pays ${bc} for {c} {good}s. How many dollars does one cost?", "{bc} // {c}"),
    Story("{bc} children make teams of {c}. How many teams are there?", "{bc} // {c}"),
    Story("{name} has {bc} {things} and packs {c} into each bag. How many bags are full?", "{bc} // {c}"),
    Story("A car drives {bc} km in {c} hours. How many km does it drive in one hour?", "{bc} // {c}"),
    Story("{name} reads a book of {bc} pages in {c} days. How many pages a day is that?", "{bc} // {c}"),
    Story("{name} has {a} {things}, buys {b} more and gives away {c}. How many are left?", "{a} + {b} - {c}"),
    Story("{name} has {a} {things}. {other} gives {name} {b} and {c} get lost. How many remain?", "{a} + {b} - {c}"),
    Story("{name} picks {a} {things}, then {b}, then {c}. How many {things} is that?", "{a} + {b} + {c}"),
    Story("{name} has ${a}, spends ${b} on a {good} and ${c} on lunch. How many dollars are left?", "{a} - {b} - {c}"),
    Story("{a} people are on a bus. {b} get off and {c} get on. How many are on it now?", "{a} - {b} + {c}"),
    Story("{name} has {c} {containers} of {b} {things} and {d} more. How many {things} is that?", "{c} * {b} + {d}"),
    Story("{name} buys {c} {good}s at ${b} each and ${d} for delivery. How many dollars is that?", "{c} * {b} + {d}"),
    Story("{name} saves ${b} a week for {c} weeks and then spends ${d}. How many dollars remain?", "{b} * {c} - {d}"),
    Story("There are {c} {containers} of {b} {things} and {d} break. How many are whole?", "{c} * {b} - {d}"),
    Story("A meal costs ${b} and a drink ${d}. How many dollars do {c} people pay for both?", "({b} + {d}) * {c}"),
    Story("{name} runs {b} km and swims {d} km each week. How many km is that in {c} weeks?", "({b} + {d}) * {c}"),
    Story("A class has {b} girls and {a} boys. Each needs {c} {things}. How many are needed?", "({b} + {a}) * {c}"),
)


class WordProblems(ToolProblems):
    """Stories about things, money, distances and time; the answer is a whole number above zero."""

    name = "word problems"

    def draw(self, rng: random.Random) -> Problem:
        story = rng.choice(STORIES)
        name, other = rng.sample(NAMES, 2)
        words = {"name": name, "other": other, "things": rng.choice(THINGS)}
        words |= {"containers": rng.choice(CONTAINERS), "good": rng.choice(GOODS)}
        while True:
            b, c, d = rng.randint(2, 60), rng.randint(2, 12), rng.randint(2, 20)
            numbers = {"a": b + rng.randint(1, 140), "b": b, "c": c, "d": d, "bc": b * c}
            expression = story.expression.format(**numbers)
            if evaluate(expression) > 0:
                return Problem(story.question.format(**words, **numbers), expression, "The answer is {result}.")
