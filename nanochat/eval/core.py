"""CORE: 22 tasks of language, knowledge and reasoning, for base and chat models (DataComp-LM).

The mean over the tasks of (accuracy - baseline) / (1 - baseline), https://arxiv.org/abs/2406.11794: guessing scores 0,
GPT-2 0.114 and GPT-2 XL 0.257 according to the bundle.

The bundle is a folder with core.yaml (list of tasks), eval_meta_data.csv (accuracy of guessing) and eval_data/ (one
JSONL file per task); it is the one that karpathy/nanochat uses.
"""

import csv
import hashlib
import json
import random
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import httpx2
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status, http_backoff

from nanochat import paths
from nanochat.data.download import resume_download
from nanochat.data.progress import progress_bar
from nanochat.errors import UserError, one_line
from nanochat.eval.multiple_choice import Option, Problem, common_prefix, is_right, score_options
from nanochat.eval.results import Result, TaskScore
from nanochat.inference.chat import ChatModel
from nanochat.locks import folder_lock
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.untrusted import reading

Kind = Literal["multiple_choice", "schema", "language_modeling"]
ORDER_SEED = 1337
EXAMPLES_SEED = 1234
"""These two seeds are karpathy/nanochat's: the same problems and examples make the scores comparable."""
URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""No digest is published: the size and the CRC-32 of each file are checked, and cached results store `fingerprint`."""
ALTERNATIVES = "pass --eval-bundle FOLDER if you have the bundle, or --benchmarks chat to skip CORE"
MAX_SHOTS = 100
MAX_BUNDLE_BYTES = 1 << 32
PROBLEMS_AT_A_TIME = 2048  # sorted by length together: enough for even batches, few enough to hold in memory


@dataclass(frozen=True)
class CoreTask:
    name: str
    kind: Kind
    shots: int  # number of solved examples before each problem
    delimiter: str  # between a context and its continuation
    baseline: float  # accuracy of guessing, 0 to 1
    path: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The problems, shuffled so that the first ones are a random sample. Raises UserError if unreadable."""
        with reading(self.path, "delete the bundle's folder and rerun"):
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for row in rows:
                options = self._options(row)
                if not all(isinstance(text, str) for option in options for text in option):
                    raise ValueError(f"not a problem: {row!r:.100}")
                options[row.get("gold", 0)]
        random.Random(ORDER_SEED).shuffle(rows)
        return rows

    def examples(self, index: int) -> list[dict[str, Any]]:
        """The solved examples for problem `index`: the same ones each time, never the problem itself."""
        others = [i for i in range(len(self.rows)) if i != index]
        picked = random.Random(EXAMPLES_SEED + index).sample(others, min(self.shots, len(others)))
        return [self.rows[i] for i in picked]

    def texts(self, index: int) -> list[tuple[str, str]]:
        """For each option of problem `index`: the text before the scored part, and the whole text."""
        shots = "".join("".join(self._options(row)[row.get("gold", 0)]) + "\n\n" for row in self.examples(index))
        texts = [(shots + start, shots + start + rest) for start, rest in self._options(self.rows[index])]
        if self.kind == "language_modeling":
            # The last space is the first character of the continuation's first token.
            texts = [(start.strip(), whole) for start, whole in texts]
        return texts

    def _options(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Context and continuation of each option."""
        if self.kind == "multiple_choice":
            return [(row["query"] + self.delimiter, choice) for choice in row["choices"]]
        if self.kind == "schema":
            return [(context + self.delimiter, row["continuation"]) for context in row["context_options"]]
        return [(row["context"].strip() + self.delimiter, row["continuation"])]

    def problem(self, index: int, tokenizer: Tokenizer, context: int) -> Problem:
        """Problem `index` in tokens, truncated on the left to `context` tokens.

        All options of a problem lose the same number of tokens, so that they keep a common prefix.
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


def read_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks of the bundle, in its order. Raises UserError if the folder is not a bundle."""
    fix = "--eval-bundle must be the folder that holds core.yaml"
    with reading(bundle / "eval_meta_data.csv", fix), reading(bundle / "core.yaml", fix):
        listed = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            CoreTask(
                name=entry["label"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
                path=bundle / "eval_data" / entry["dataset_uri"],
            )
            for entry in listed
        ]
        for task in tasks:
            if task.kind not in get_args(Kind) or not task.path.is_file():
                raise ValueError(f"{task.path} is missing or task type {task.kind!r} is unknown")
            if ".." in task.path.relative_to(bundle).parts:
                raise ValueError(f"{task.path} is outside")
            if not (0 <= task.shots <= MAX_SHOTS and 0 <= task.baseline < 1 and isinstance(task.delimiter, str)):
                raise ValueError(f"impossible settings of {task.name}")
        return tasks


def fingerprint(bundle: Path) -> str:
    """Hash of everything in the bundle that the scores depend on."""
    digest = hashlib.sha256()
    for path in (bundle / "core.yaml", bundle / "eval_meta_data.csv", *(task.path for task in read_tasks(bundle))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Core:
    """The tasks of one bundle. A `Benchmark`."""

    name = "CORE"
    needs_chat = False

    def __init__(self, bundle: Path, max_per_task: int | None = None) -> None:
        self.tasks = read_tasks(bundle)
        self.bundle = bundle
        self.max_per_task = max_per_task

    def key(self) -> dict[str, Any]:
        return {"bundle": fingerprint(self.bundle), "max_per_task": self.max_per_task}

    def evaluate(self, chat: ChatModel, batch_tokens: int, on_task: Callable[[str], None]) -> Result:
        scores = []
        for task in self.tasks:
            on_task(task.name)
            right = right_answers(chat.engine.model, chat.tokenizer, task, batch_tokens, self.max_per_task)
            scores.append(TaskScore(task.name, len(right), sum(right) / len(right), task.baseline))
        return Result(scores)


def right_answers(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, batch_tokens: int, max_per_task: int | None = None
) -> list[bool]:
    """True for each of the task's first problems that the model answers correctly."""
    count = min(len(task.rows), max_per_task or len(task.rows))
    right: list[bool] = []
    for start in range(0, count, PROBLEMS_AT_A_TIME):
        indices = range(start, min(start + PROBLEMS_AT_A_TIME, count))
        problems = [task.problem(i, tokenizer, model.config.sequence_len) for i in indices]
        right.extend(map(is_right, problems, score_options(model, problems, batch_tokens)))
    return right


def fetch_bundle() -> Path:
    """Return the bundle's folder, downloaded if missing, with resume, by one process at a time. Raises UserError."""
    folder = paths.base_dir() / "eval_bundle"
    if folder.exists():
        return folder
    downloads = paths.data_dir("eval_bundle")
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with folder_lock(downloads):
            if not folder.exists():
                _download(downloads, folder)
    except httpx2.HTTPError as error:
        raise UserError(f"cannot download {URL} ({one_line(error)}): try again later, or {ALTERNATIVES}") from error
    return folder


def _download(downloads: Path, folder: Path) -> None:
    """Download the zip file, unpack it with its CRCs checked, check the tasks, then move them to `folder`."""
    if constants.is_offline_mode():
        raise UserError(f"the CORE bundle is missing and HF_HUB_OFFLINE is set: unset it, or {ALTERNATIVES}")
    print(f"downloading the CORE bundle from {URL}", flush=True)
    response = http_backoff("HEAD", URL, headers={"Accept-Encoding": "identity"})
    hf_raise_for_status(response)
    size = int(response.headers.get("Content-Length", "0"))
    if not 0 < size <= MAX_BUNDLE_BYTES:
        raise UserError(f"{URL} has {size:,} bytes, which is not the CORE bundle: try again later, or {ALTERNATIVES}")
    version = hashlib.sha256(f"{size} {response.headers.get('ETag', '')}".encode()).hexdigest()[:16]
    archive = downloads / f".{version}.partial"  # a partial download of another version is not continued
    with progress_bar("CORE bundle", size, in_bytes=True) as advance:
        advance(archive.stat().st_size if archive.exists() else 0)
        resume_download(URL, size, archive, advance, with_token=False)
    with tempfile.TemporaryDirectory(dir=downloads) as unpacked:
        try:
            with zipfile.ZipFile(archive) as packed:
                unpacked_size = sum(entry.file_size for entry in packed.infolist())
                if unpacked_size > max(20 * size, 1 << 26):
                    raise ValueError(f"it unpacks to {unpacked_size:,} bytes")
                packed.extractall(unpacked)
        except OSError:
            raise
        except Exception as error:  # a malformed one can raise anything
            archive.unlink()
            raise UserError(f"the download of {URL} is damaged ({error}): rerun to repeat it") from error
        read_tasks(Path(unpacked) / "eval_bundle")
        (Path(unpacked) / "eval_bundle").rename(folder)
    archive.unlink()
