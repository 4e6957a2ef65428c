"""Small datasets in the real ones' files and schemas, written by rule, for the fake hub to serve."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from nanochat.data import demo_data

Row = dict[str, Any]
COLORS = ["red", "green", "blue", "white", "black"]
ARTICLES_PER_SHARD = 20
NUM_SHARDS = 4


def write_datasets(root: Path) -> None:
    """Write every dataset that prepare.sh downloads to `root`/datasets."""
    for path, rows in all_rows().items():
        write_rows(root / "datasets" / path, rows)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a parquet file with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8)


def all_rows() -> dict[str, list[Row]]:
    """Return the rows of each file by its path below datasets/."""
    texts = demo_data.documents("train")
    files: dict[str, list[Row]] = {}
    for dataset in ("fineweb-edu-100b-shuffle", "climbmix-400b-shuffle"):
        for i in range(NUM_SHARDS):
            shard = texts[i * ARTICLES_PER_SHARD : (i + 1) * ARTICLES_PER_SHARD]
            files[f"karpathy/{dataset}/shard_{i:05d}.parquet"] = [{"text": text} for text in shard]
    for i in range(4):
        files[f"HuggingFaceTB/smol-smoltalk/data/train-{i:05d}-of-00004.parquet"] = [talk(8 * i + j) for j in range(8)]
    files["HuggingFaceTB/smol-smoltalk/data/test-00000-of-00001.parquet"] = [talk(i) for i in range(50, 58)]
    files["openai/gsm8k/main/train-00000-of-00001.parquet"] = [word_problem(i) for i in range(24)]
    files["openai/gsm8k/main/test-00000-of-00001.parquet"] = [word_problem(i) for i in range(50, 62)]
    files["openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet"] = [program(i) for i in range(6)]
    files["cais/mmlu/all/test-00000-of-00001.parquet"] = [exam(i) for i in range(12)]
    # The real auxiliary file has the same quirk: each row is wrapped in a struct.
    files["cais/mmlu/auxiliary_train/train-00000-of-00001.parquet"] = [{"train": exam(i)} for i in range(50, 62)]
    for subset in ("Easy", "Challenge"):
        files[f"allenai/ai2_arc/ARC-{subset}/train-00000-of-00001.parquet"] = [science(i) for i in range(12)]
        files[f"allenai/ai2_arc/ARC-{subset}/test-00000-of-00001.parquet"] = [science(i) for i in range(50, 62)]
    return files


def talk(number: int) -> Row:
    """A row of SmolTalk, every third with a system message."""
    system = [{"role": "system", "content": "Answer in one sentence."}] * (number % 3 == 0)
    question = {"role": "user", "content": f"What comes after {number}?"}
    answer = {"role": "assistant", "content": f"After {number} comes {number + 1}."}
    return {"messages": [*system, question, answer], "source": "rule"}


def word_problem(number: int) -> Row:
    """A row of GSM8K, whose answer marks its calculations."""
    a, b = number + 2, 3 * number + 1
    work = f"Both have {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pears.\nHalf is {a + b}/2=<<{a + b}/2={(a + b) / 2:g}>>half."
    question = f"Ann has {a} pears and Bo has {b}. How many are half of them?"
    return {"question": question, "answer": f"{work}\n#### {(a + b) / 2:g}"}


def exam(number: int) -> Row:
    """A row of MMLU."""
    choices = [str(number + i) for i in range(4)]
    question = f"What is {number} plus {number % 4}?"
    return {"question": question, "subject": "abstract_algebra", "choices": choices, "answer": number % 4}


def science(number: int) -> Row:
    """A row of ARC: three to five choices, every other row with digits for labels."""
    count = 3 + number % 3
    labels = list("12345" if number % 2 else "ABCDE")[:count]
    choices = {"text": COLORS[:count], "label": labels}
    question = f"Which is color number {number % count} of these?"
    return {"id": f"rule_{number}", "question": question, "choices": choices, "answerKey": labels[number % count]}


def program(number: int) -> Row:
    """A row of HumanEval."""
    name = f"add_{number}"
    docstring = f'    """Add {number} to x.\n    >>> {name}(1)\n    {number + 1}\n    """'
    checks = f"    assert candidate(1) == {number + 1}\n    assert candidate(-5) == {number - 5}"
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def {name}(x: int) -> int:\n{docstring}\n",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n{checks}\n",
        "entry_point": name,
    }
