"""Write example data for docs/your-own-data.md: the conversations of a workshop's assistant, and unit conversions.

.venv/bin/python docs/example_data.py mydata
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

FACTS = [
    ("your opening hours", "when you are open", "We are open from Tuesday to Saturday, from nine to six."),
    ("your address", "where to find you", "You find us at 12 Harbor Lane, next to the fish market."),
    ("the price of a check", "what a check costs", "A full check of your bicycle costs 45 euros."),
    ("the price of a new chain", "what a new chain costs", "A new chain costs 30 euros, with fitting."),
    ("fixing a flat tire", "how long a flat tire takes", "A flat tire takes a quarter of an hour while you wait."),
    (
        "electric bicycles",
        "if you repair electric bicycles",
        "Yes, but not their batteries.",
    ),
    ("renting a bicycle", "what it costs to rent a bicycle", "A bicycle costs 15 euros per day, and a helmet is free."),
    ("used bicycles", "if you sell used bicycles", "Yes, we sell used bicycles with a warranty of one year."),
    ("paying by card", "how to pay", "You can pay in cash or by card."),
    ("appointments", "if an appointment is needed", "Small repairs need no appointment. For a check, please call us."),
    ("your phone number", "how to call you", "Please call 555 0142 during our opening hours."),
    (
        "children's bicycles",
        "if you have bicycles for children",
        "Yes, from four years on.",
    ),
    ("your name", "what you are called", "I am Sprocket, the assistant of the Harbor Lane bicycle workshop."),
    ("the owner", "who runs the workshop", "Two sisters run the workshop, and four people work here."),
    ("old inner tubes", "what happens to old inner tubes", "We make bags of old inner tubes, and sell them here."),
    (
        "the repair evening",
        "when the repair evening is",
        "On the first Friday of each month, for free.",
    ),
    (
        "winter storage",
        "if you store bicycles in winter",
        "Yes, from November to March, for 60 euros.",
    ),
    ("cargo bicycles", "if cargo bicycles fit in", "Yes, cargo bicycles fit through our wide door."),
    ("lost keys", "what to do about a lost key", "Bring the bicycle and a proof of purchase, and we open the lock."),
    ("the warranty on repairs", "how long repairs are guaranteed", "We guarantee every repair for six months."),
]
ASKED = ["Please explain {0}.", "I have a question about {0}.", "Do you know {1}?", "I want to know {1}.", "{0}?"]
HELD_OUT = ["Could you explain {1}, please?", "Hello! I would like to know about {0}."]
UNITS = [("kilometers", "meters", 1000), ("hours", "minutes", 60), ("meters", "centimeters", 100), ("weeks", "days", 7),
         ("dozen", "pieces", 12), ("feet", "inches", 12)]  # fmt: skip


def chats(patterns: Iterable[str], greetings: Iterable[str]) -> list[dict[str, object]]:
    """Conversations in ShareGPT's format, one per fact, pattern and greeting."""
    greetings = list(greetings)
    return [
        {"conversations": [
            {"from": "human", "value": greeting + pattern.format(topic, clause)}, {"from": "gpt", "value": answer},
        ]}
        for topic, clause, answer in FACTS for pattern in patterns for greeting in greetings
    ]  # fmt: skip


def problems(count: int, numbers: range) -> list[dict[str, object]]:
    """Unit conversions, solved with the python tool. Every fifth has another grader than `number`."""
    rng, rows = random.Random(count), []
    for i in range(count):
        (large, small, factor), number = rng.choice(UNITS), rng.choice(numbers)
        result = number * factor
        text = f"{number} {large} are {result} {small}."
        answer = [
            {"type": "python", "text": f"{number} * {factor}"},
            {"type": "python_output", "text": str(result)},
            {"type": "text", "text": text},
        ]
        row = {"question": f"How many {small} are {number} {large}?", "answer": answer, "grader": "number"}
        if i % 5 == 0:
            rules = {
                "exact": text,
                "contains": f"{result} {small}",
                "regex": rf"\b{result} {small}",
                "python": f"'{result}' in reply.split()",
            }
            row["grader"], row["rule"] = list(rules.items())[i // 5 % 4]
        rows.append(row)
    return rows


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "chats.jsonl": chats(ASKED, ["", "Hi! "]),
        "chats-held-out.jsonl": chats(HELD_OUT, [""]),
        "problems.jsonl": problems(300, range(2, 200, 2)),
        "problems-held-out.jsonl": problems(200, range(3, 200, 2)),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {len(rows)} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "mydata"))
