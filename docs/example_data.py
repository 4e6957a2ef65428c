"""Write example data for docs/your-own-data.md: conversations of a workshop's assistant, and unit conversions.

.venv/bin/python docs/example_data.py mydata
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

CHATS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
UNITS = {
    ("kilometers", "meters"): 1000, ("meters", "centimeters"): 100, ("kilograms", "grams"): 1000,
    ("liters", "milliliters"): 1000, ("yards", "feet"): 3, ("feet", "inches"): 12, ("pounds", "ounces"): 16,
    ("years", "months"): 12, ("weeks", "days"): 7, ("days", "hours"): 24, ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60, ("dozen", "pieces"): 12,
}  # fmt: skip
GRADERS = [*["number"] * 16, "exact", "contains", "regex", "python"]


def chats(answers: dict[str, str], questions: Iterable[str]) -> list[dict[str, object]]:
    """Conversations in ShareGPT's format, one per question and answer."""
    return [
        {"conversations": [{"from": "human", "value": question.format(topic)}, {"from": "gpt", "value": answer}]}
        for question in questions
        for topic, answer in answers.items()
    ]


def problem(number: int, large: str, small: str, grader: str) -> dict[str, object]:
    """A unit conversion, solved with the python tool."""
    factor = UNITS[large, small]
    result = number * factor
    text = f"{number} {large} are {result} {small}."
    answer = [
        {"type": "python", "text": f"{number} * {factor}"},
        {"type": "python_output", "text": str(result)},
        {"type": "text", "text": text},
    ]
    rules = {
        "exact": text,
        "contains": f"{result} {small}",
        "regex": rf"\b{result} {small}",
        "python": f"'{result}' in reply.split()",
    }
    rule = {"rule": rules[grader]} if grader in rules else {}
    return {"question": f"How many {small} are {number} {large}?", "answer": answer, "grader": grader, **rule}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for language, name in (("en", "chats"), ("de", "chats-de")):
        texts = CHATS[language]
        asked = [greeting + question for greeting in texts["greetings"] for question in texts["questions"]]
        files[f"{name}.jsonl"] = chats(texts["answers"], asked)
        files[f"{name}-held-out.jsonl"] = chats(texts["answers"], texts["held_out"])
    pairs = [(number, *units) for units in UNITS for number in range(2, 102)]
    random.Random(0).shuffle(pairs)
    rows = [problem(*pair, GRADERS[i % len(GRADERS)]) for i, pair in enumerate(pairs)]
    files |= {"problems.jsonl": rows[:300], "problems-held-out.jsonl": rows[300:]}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {len(rows)} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "mydata"))
