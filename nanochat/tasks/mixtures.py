"""The mixture of each stage: mixtures.yaml in the base directory, and the data given with --add or --task.

The default mixtures are files next to this one, in data/. The real ones follow the original nanochat
(https://github.com/karpathy/nanochat), with refusals added.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat import conversation_files, paths
from nanochat.atomic import atomic_write
from nanochat.data import demo_data
from nanochat.data.packing import PackedRows
from nanochat.data.progress import track
from nanochat.data.token_files import TokenFile
from nanochat.data.token_writer import is_current, write_conversations
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.runtime import Runtime
from nanochat.stages import STAGES
from nanochat.tasks import problems
from nanochat.tasks.arithmetic import Arithmetic, WordProblems
from nanochat.tasks.encyclopedia import Encyclopedia, Topics
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.hub_task import HubConversations, HubTask, SmolTalk
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.multiple_choice import ARC, MMLU
from nanochat.tasks.problems import Problems
from nanochat.tasks.spelling import LetterCount, Spelling, WordTask, spelling_words
from nanochat.tasks.task import DATA, ConversationList, GradedTask, Mixture, Split, Task
from nanochat.tokenizer import Tokenizer
from nanochat.untrusted import reading

HUB_TASKS: tuple[type[HubTask], ...] = (ARC, GSM8K, HumanEval, MMLU, SmolTalk)
ROWS_PER_STAGE = 10_000
"""Generated problems of different stages are disjoint: those of each stage start at another multiple of this."""

Weight = float | str


def _words(task: type[WordTask], rows: int | None) -> WordTask:
    """A task of at least `rows` rows about the train words, each repeat worded differently."""
    once = task(spelling_words(), "train")
    return task(spelling_words(), "train", math.ceil(rows / max(1, len(once)))) if rows else once


OURS: Mapping[str, Callable[[int | None, int], Task]] = {
    "smoltalk": lambda *_: SmolTalk("train"),
    "mmlu": lambda *_: MMLU("train"),
    "gsm8k": lambda *_: GSM8K("train"),
    "arc easy": lambda *_: ARC("Easy", "train"),
    "arc challenge": lambda *_: ARC("Challenge", "train"),
    "identity": lambda *_: ConversationList("identity", conversation_files.read(paths.identity_file())),
    "refusals": lambda *_: ConversationList("refusals", conversation_files.read(DATA / "refusals.jsonl")),
    "spelling": lambda rows, start: _words(Spelling, rows),
    "letter count": lambda rows, start: _words(LetterCount, rows),
    "arithmetic": lambda rows, start: Arithmetic("train", rows or ROWS_PER_STAGE, start),
    "word problems": lambda rows, start: WordProblems("train", rows or ROWS_PER_STAGE, start),
    "encyclopedia": lambda *_: Encyclopedia(),
    "topics": lambda *_: Topics(),
    "small talk": lambda *_: ConversationList("small talk", demo_data.chitchat("train")),
}
"""Tasks by their names in mixtures.yaml, made from a number of rows to generate and the first one's number."""


def load_mixture(stage: str, given: Sequence[str] = (), *, only: bool = False) -> Mixture:
    """The data of a stage from mixtures.yaml (not if `only`) and `given` (NAME or NAME:WEIGHT), which has precedence.

    Raises UserError if the file or data in it is invalid, or if there is none.
    """
    entries: dict[str, Weight] = {} if only else read_mixtures().get(stage, {})
    entries |= dict(map(parse_given, given))
    if not entries:
        option = "--task" if stage == "rl" else "--add"
        raise UserError(f"{stage} has no training data: pass {option}, or list data in {paths.mixtures_file()}")
    start = ([*STAGES].index(stage) - 1) * ROWS_PER_STAGE
    tasks = []
    for name, weight in entries.items():
        rows, repeats = parse_weight(name, weight)
        task = OURS[name](rows, start) if name in OURS else load_task(name, graded=stage == "rl")
        if stage == "rl" and not isinstance(task, GradedTask):
            raise UserError(f"{name} has no grader, which RL needs: see docs/your-own-data.md")
        tasks.append((task, min(rows, len(task)) / max(1, len(task)) if rows else repeats))
    names = (name if re.fullmatch(r"[\w/][\w./ -]*", name) else json.dumps(name) for name in entries)
    lines = [f"{name}: {weight}" for name, weight in zip(names, entries.values(), strict=True)]
    mixture = Mixture(tasks, name=stage, lines=lines)
    if not len(mixture):
        raise UserError(f"the weights of {', '.join(entries)} leave no rows for {stage}: raise them")
    return mixture


def write_default() -> Path:
    """Write mixtures.yaml unless it exists, and return its path."""
    path = paths.mixtures_file()
    with folder_lock(path.parent):
        if not path.exists():
            with atomic_write(path) as file:
                default = "mixtures_demo.yaml" if paths.demo_option() else "mixtures.yaml"
                file.write((DATA / default).read_text(encoding="utf-8"))
    return path


def read_mixtures() -> dict[str, dict[str, Weight]]:
    """Read mixtures.yaml: weights by name, by stage. Names of files become absolute paths."""
    path = write_default()
    with reading(path, "fix it, or delete it"):
        listed: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or not all(isinstance(entries, dict | None) for entries in listed.values()):
        raise UserError(f"{path} must list names with weights under each of mid, sft and rl: fix it, or delete it")
    if unknown := listed.keys() - STAGES:
        raise UserError(f"{path} has the stage {unknown.pop()!r}, expected one of mid, sft and rl: rename it")
    stages = ((stage, entries or {}) for stage, entries in listed.items())
    return {stage: {_absolute(str(name), path.parent): w for name, w in entries.items()} for stage, entries in stages}


def _absolute(name: str, folder: Path) -> str:
    path = folder / Path(name).expanduser()
    return name if name in OURS or not path.exists() else str(path.resolve())


def parse_given(text: str) -> tuple[str, Weight]:
    """Split NAME or NAME:WEIGHT, the value of --add and --task."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        name, weight = text, "1"
    if not name:
        raise UserError(f"--add and --task need a file, a folder or a name, got {text!r}")
    return _absolute(name, Path.cwd()), weight


def parse_weight(name: str, weight: Any) -> tuple[int | None, float]:
    """Return either a number of rows or how often all rows are used. Raises UserError if `weight` is neither."""
    if rows := re.fullmatch(r"([1-9][0-9]*) rows", str(weight)):
        return int(rows[1]), 0.0
    try:
        if not isinstance(weight, bool) and 0 < float(weight) <= 1000:
            return None, float(weight)
    except (TypeError, ValueError):
        pass
    raise UserError(f'the weight of {name} must be above 0 and at most 1000, or such as "500 rows", got {weight}')


def load_task(name: str, *, graded: bool, split: Split = "train") -> Task:
    """Load the task that a Python file defines, or conversations from a file, a folder or the Hugging Face Hub.

    `graded`: each must have a grader. Raises UserError if something is missing or invalid.
    """
    path = Path(name).expanduser()
    if path.suffix == ".py":
        return problems.load_python(path, split)
    if path.exists():
        rows = conversation_files.read(path, problems.find_problem) if graded else conversation_files.read(path)
        return (Problems if graded else ConversationList)(path.name, rows)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", name) and path.suffix not in (".json", ".jsonl"):
        return HubConversations(name)
    raise UserError(f"{name} is not a file, a folder, owner/name on the hub, or one of {', '.join(OURS)}: check it")


def conversation_rows(
    mixture: Mixture, tokenizer: Tokenizer, sequence_len: int, runtime: Runtime, *, learn_all: bool, one_per_row: bool
) -> PackedRows:
    """Tokenize `mixture` into tokens/<its name> unless that is up to date, and pack it into rows."""
    folder = paths.tokens_dir(mixture.name)
    if runtime.world.is_main:
        print(f"{mixture}\n")
    if runtime.world.is_local_main:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            if not is_current(folder, "train", tokenizer, mixture.fingerprint):
                rows = track(f"tokenizing {mixture.name}", mixture, len(mixture))
                write_conversations(folder, "train", tokenizer, rows, mixture.fingerprint)
    runtime.world.barrier()
    packed = PackedRows(
        TokenFile.open(folder, "train", tokenizer), sequence_len, tokenizer.bos_id,
        learn_all=learn_all, documents_per_row=1 if one_per_row else None,
    )  # fmt: skip
    if packed.num_cut and runtime.world.is_main:
        print(
            f"note: {packed.num_cut:,} of {len(mixture):,} conversations are longer than the context of "
            f"{sequence_len:,} tokens: {packed.tokens_lost:,} tokens at their ends are left out\n"
        )
    return packed
