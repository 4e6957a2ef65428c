"""The tasks of CORE (DataComp-LM, https://arxiv.org/abs/2406.11794) as the evaluation bundle gives them.

A bundle is a folder with core.yaml, the list of tasks; eval_meta_data.csv, which has what guessing gives; and
eval_data/, a jsonl file for each task. nanochat.eval.core_bundle brings the one that everybody uses.
"""

import csv
import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from nanochat.errors import UserError
from nanochat.eval.option_scores import Option, Problem, common_prefix
from nanochat.tokenizer import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
ORDER_SEED = 1337
EXAMPLES_SEED = 1234
"""With these two, nanochat's seed picks its problems and examples; the same ones make the scores comparable."""


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle."""

    name: str
    kind: Kind
    shots: int
    """solved examples before each problem"""
    delimiter: str
    """between a context and what continues it"""
    baseline: float
    """what guessing gives, 0 to 1"""
    path: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The file's problems, shuffled: the first of them are a fair sample. Raises UserError if it is unreadable."""
        try:
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path} ({error}): delete the bundle's folder and run it again") from None
        random.Random(ORDER_SEED).shuffle(rows)
        return rows

    def examples(self, index: int) -> list[dict[str, Any]]:
        """The solved examples for problem `index`: always the same ones, never itself."""
        others = [i for i in range(len(self.rows)) if i != index]
        picked = random.Random(EXAMPLES_SEED + index).sample(others, min(self.shots, len(others)))
        return [self.rows[i] for i in picked]

    def texts(self, index: int) -> list[tuple[str, str]]:
        """Of each option of problem `index`, the text before what is scored, and all of it."""
        before = "".join(f"{self._solved(row)}\n\n" for row in self.examples(index))
        row = self.rows[index]
        if self.kind == "multiple_choice":
            asked = before + row["query"] + self.delimiter
            return [(asked, asked + choice) for choice in row["choices"]]
        if self.kind == "schema":
            starts = [before + context + self.delimiter for context in row["context_options"]]
            return [(start, start + row["continuation"]) for start in starts]
        asked = before + row["context"].strip() + self.delimiter
        # The last space is the first character of the continuation's first token.
        return [(asked.strip(), asked + row["continuation"])]

    def problem(self, index: int, tokenizer: Tokenizer, context: int) -> Problem:
        """Problem `index` in tokens, its beginning cut off where it is longer than `context` tokens.

        Of a problem's options the same number of tokens is cut, so that they still begin alike.
        """
        texts = self.texts(index)
        whole = [[tokenizer.bos_id, *tokenizer.encode(text)] for _, text in texts]
        if self.kind == "language_modeling":
            asked = [tokenizer.bos_id, *tokenizer.encode(texts[0][0])]
            starts = [common_prefix([asked, whole[0]])]
        elif self.kind == "schema":
            same = common_prefix([tokens[::-1] for tokens in whole])
            starts = [len(tokens) - same for tokens in whole]
        else:
            starts = [common_prefix(whole)] * len(whole)
        cut = max(0, max(map(len, whole)) - context)
        options = [
            Option(tokens[cut:], max(1, min(start, len(tokens) - 1) - cut))
            for tokens, start in zip(whole, starts, strict=True)
        ]
        return Problem(options, self.rows[index].get("gold", 0))

    def _solved(self, row: dict[str, Any]) -> str:
        if self.kind == "multiple_choice":
            return str(row["query"] + self.delimiter + row["choices"][row["gold"]])
        if self.kind == "schema":
            return str(row["context_options"][row["gold"]] + self.delimiter + row["continuation"])
        return str(row["context"].strip() + self.delimiter + row["continuation"])


def read_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks that the bundle lists, in its order. Raises UserError if the folder is no bundle."""
    try:
        listed = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", newline="") as file:
            guessing = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            CoreTask(
                name=entry["label"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=guessing[entry["label"]],
                path=bundle / "eval_data" / entry["dataset_uri"],
            )
            for entry in listed
        ]
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{bundle} is no evaluation bundle ({type(error).__name__}: {error}): name the folder that holds core.yaml "
            "with --eval-bundle"
        ) from None
    for task in tasks:
        if task.kind not in get_args(Kind) or not task.path.is_file():
            raise UserError(f"{bundle} lacks {task.path.name}, or knows another kind of task: use a whole bundle")
    return tasks


def fingerprint(bundle: Path) -> str:
    """A hash over all that the scores depend on: two bundles that differ in a byte differ in it."""
    digest = hashlib.sha256()
    for path in (bundle / "core.yaml", bundle / "eval_meta_data.csv", *(task.path for task in read_tasks(bundle))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
