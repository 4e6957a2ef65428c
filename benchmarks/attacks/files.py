"""Damaged files, and files made to crash, hang or exhaust the program that reads them."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from benchmarks.random_model import random_model
from nanochat import cli, paths
from nanochat.data import demo_data, documents
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.eval import core
from nanochat.hub import card, export, verify
from nanochat.inference.chat import load_chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.report import build
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from scripts import import_hf
from scripts.checkpoints import Options as CheckpointOptions
from scripts.checkpoints import main as list_checkpoints

MUTATIONS = 500
MAX_SECONDS = 10.0  # of CPU time, so that other work on the machine does not matter
MAX_WAIT = 10  # times as long, for readers that wait
NUM_PROCESSES = os.cpu_count() or 1
STEP = 3
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 2**31, 10**7, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "0",
    "../../x", "/etc/passwd", "\ud800", "\x1b[2J", "a" * 10**6, [], {}, [None], [[]], {"": None}, [0] * 1000, "(a+)+$",
]  # fmt: skip


def files(folder: Path, mutations: int = MUTATIONS, seed: int = 0) -> Iterator[tuple[str, bool]]:
    """Read mutated exports, original checkpoints, base directories, data shards and bundles.

    An attack succeeds if the reader prints a traceback, takes over ten seconds, hangs, or fails without one line.
    """
    sound = make_sound_folder(folder)
    cases = (start_case(folder, sound, random.Random(f"{seed} {number}"), number) for number in range(mutations))
    running = deque(itertools.islice(cases, NUM_PROCESSES))
    while running:
        name, copy, reader = running.popleft()
        problem = reader.problem()
        yield f"{name}: {problem}", problem is not None
        shutil.rmtree(copy)
        running.extend(itertools.islice(cases, 1))


def start_case(folder: Path, sound: Path, rng: random.Random, number: int) -> tuple[str, Path, "RunningReader"]:
    """Change a copy of sound files and start its reader; return a description, the copy's folder and the reader."""
    kind = rng.choices(list(READERS), [weight for weight, _ in READERS.values()])[0]
    copy = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(sound / kind, copy / kind)
    name = f"{kind} {number}: {mutate(copy / kind, rng)}"
    return name, copy, RunningReader(READERS[kind][1], copy / kind, copy / "log")


def new_process(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Return a process that will be forked from one with modules and caches, which saves seconds of CPU time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.attacks.warm"])
    return context.Process(target=target, args=args)


class RunningReader:
    """A separate process that calls `reader(path)` as a script would."""

    def __init__(self, reader: Callable[[Path], None], path: Path, log: Path, seconds: float = MAX_SECONDS) -> None:
        self.log = log
        self.max_wait = seconds * MAX_WAIT
        self.process = new_process(_call, reader, path, log, round(seconds))
        self.process.start()
        self.deadline = time.monotonic() + self.max_wait

    def problem(self) -> str | None:
        """Wait until it ends, or end it when its time is up. Returns what went wrong, None if nothing did."""
        self.process.join(max(0.0, self.deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return f"took over {self.max_wait:.0f} s"
        return problem_in(self.process.exitcode, self.log.read_text(errors="replace"))


def problem_in(exit_code: int | None, output: str) -> str | None:
    """Return what is wrong with how a command ended. It must succeed, or print one line and exit with code 2."""
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if exit_code not in (0, 2) or any("Traceback" in line or "panicked" in line for line in lines):
        return f"exit code {exit_code}: {' '.join(lines[-3:])[-300:]}"
    if exit_code == 2 and (len(errors) != 1 or lines[-1] != errors[0] or len(errors[0]) > 1000):
        return f"not one line: {lines[-1][-300:] if lines else ''}"
    return None


def _call(reader: Callable[[Path], None], path: Path, log: Path, seconds: int) -> None:
    """Run a reader with its output in `log`. The base directory is `path`, or a folder next to it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # ends with SIGKILL
    torch.set_num_threads(1)
    verify.NUM_TEXTS = 100
    os.environ["NANOCHAT_BASE_DIR"] = str(path if path.name == "base" else path.with_name("other"))
    cli.run(lambda _: reader(path), CheckpointOptions, args=[])


def make_sound_folder(folder: Path) -> Path:
    """Write one of each kind of files; return their folder."""
    sound, log = folder / "sound", folder / "log"
    if problem := RunningReader(make_sound_files, sound, log, seconds=300).problem():
        raise RuntimeError(f"{problem}: {log.read_text()}")
    return sound


def make_sound_files(folder: Path) -> None:
    """Write one of each kind, which its reader accepts."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder / "base")
    tokenizer = Tokenizer.train(demo_data.documents("train")[:100], 512)
    tokenizer.save(paths.tokenizer_dir())
    with Runtime.start("cpu") as runtime:
        model = random_model(1, tokenizer.vocab_size, 64, runtime)
    meta = {
        "source": "sft", "tag": "d1", "num_iterations": STEP, "trained_on": "text", "tokenizer": tokenizer.hash,
        "model_config": vars(model.config), "num_parameters": model.config.num_parameters, "options": {"seed": 1},
        "parent": None, "data": None, "seconds": 60.0, "results": {}, "machine": "machine", "software": "software",
        "peak_memory": 1, "commit": "unknown",
    }  # fmt: skip
    saved = checkpoint.write(paths.checkpoints_dir("sft") / "d1", STEP, model.state_dict(), {}, meta)
    rows = [{"step": i, "loss": 3.0, "tokens": 64, "seconds": 2.0 * i, "mfu": 0.3} for i in range(1, STEP + 1)]
    run = saved.folder.parent
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "samples": ["a", "b"]}) + "\n")
    (run / "run.json").write_text(json.dumps(saved.meta))
    publisher = card.Publisher("ada", "ada", "mit")
    exported = export.export(saved, publisher, folder / "exports", torch.device("cpu"), lambda line: None)
    exported.rename(folder / "export")

    original = folder / "original"
    original.mkdir()
    shape = {"sequence_len": 64, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 64}
    sizes = {"attn.c_q": (64, 64), "attn.c_k": (64, 64), "attn.c_v": (64, 64), "attn.c_proj": (64, 64)}
    sizes |= {"mlp.c_fc": (256, 64), "mlp.c_proj": (64, 256)}
    weights = {f"transformer.h.0.{name}.weight": torch.ones(size) for name, size in sizes.items()}
    weights |= {name: torch.ones(576, 64) for name in ("transformer.wte.weight", "lm_head.weight")}
    torch.save(weights, original / "model_000001.pt")
    (original / "meta_000001.json").write_text(json.dumps({"model_config": shape}))
    (original / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding))

    (folder / "shard").mkdir()
    table = pyarrow.table({"text": demo_data.documents("val")[:20]})
    pyarrow.parquet.write_table(table, folder / "shard" / "shard_00000.parquet")
    tokenizer.save(folder / "shard" / "tokenizer")

    bundle = folder / "bundle"
    (bundle / "eval_data").mkdir(parents=True)
    kinds = ("language_modeling", "multiple_choice", "schema")
    tasks = [{"label": k, "dataset_uri": f"{k}.jsonl", "num_fewshot": [1], "icl_task_type": k} for k in kinds]
    (bundle / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "".join(f"{k},25\n" for k in kinds))
    problem = {"context": "a", "continuation": "b", "query": "q", "choices": ["a", "b"], "gold": 1}
    for kind in kinds:
        lines = 3 * (json.dumps(problem | {"context_options": ["x", "y"]}) + "\n")
        (bundle / "eval_data" / f"{kind}.jsonl").write_text(lines)
    tokenizer.save(bundle / "tokenizer")


def import_model(folder: Path) -> None:
    import_hf.main(import_hf.Options(str(folder)))


def use_base_directory(folder: Path) -> None:
    """List the checkpoints, write the report and chat. The first error does not keep the others from being tried."""
    errors = []

    def chat() -> None:
        load = load_chat(checkpoint.find(None), "cpu")
        load.engine.generate([load.prompt([{"role": "user", "content": "Hi"}])], SamplingParams(max_tokens=2))

    for action in (lambda: list_checkpoints(CheckpointOptions()), build.write, chat):
        try:
            action()
        except cli.UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def tokenize_shard(folder: Path) -> None:
    parts = documents.find_parts(folder, [folder / "shard_00000.parquet"], ["text"])
    shards = [TextShard(part.name, "origin", partial(documents.read, part)) for part in parts]
    write_shards(folder / "tokens", {"train": shards}, Tokenizer.load(folder / "tokenizer"), workers=1)


def read_bundle(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for task in core.read_tasks(folder):
        for index in range(len(task.rows)):
            task.problem(index, tokenizer, 64)


READERS: dict[str, tuple[int, Callable[[Path], None]]] = {  # how often each kind is chosen, and what reads it
    "export": (6, import_model),
    "original": (3, import_model),
    "base": (6, use_base_directory),
    "shard": (3, tokenize_shard),
    "bundle": (2, read_bundle),
}


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of the folder; return a description."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    change = rng.choice(CHANGES)
    if path.suffix in (".json", ".jsonl", ".yaml") and rng.random() < 0.7:
        change = change_json
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        change = change_header
    if path.suffix == ".parquet" and rng.random() < 0.7:
        change = change_column
    return f"{path.relative_to(folder)}: {change(path, rng)}"


def change_json(path: Path, rng: random.Random) -> str:
    """Replace, remove or add one entry anywhere in the document, or in one line of a JSONL file."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines)) if lines else 0
    try:
        document = [json.loads(lines[number])]
    except (ValueError, IndexError):
        return flip_bits(path, rng)
    places: list[tuple[Any, Any]] = []

    def collect(container: Any) -> None:
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                collect(container[key])

    collect(document)
    container, key = rng.choice(places[:1000])
    value = rng.choice(ODD_VALUES)
    if rng.random() < 0.1 and container is not document:
        del container[key]
        value = "removed"
    elif rng.random() < 0.1:
        value = "[" * 100_000
    else:
        container[key] = value
    lines[number] = value if value == "[" * 100_000 else json.dumps(document[0])
    path.write_text("\n".join(lines))
    return f"{key!s:.40} = {value!r:.40}"


def change_header(path: Path, rng: random.Random) -> str:
    """Change the JSON at the start of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = path.with_name("header.json")
    header.write_bytes(content[8 : 8 + size])
    what = change_json(header, rng)
    changed = header.read_bytes()
    header.unlink()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    return what


def change_column(path: Path, rng: random.Random) -> str:
    """Write another column `text`."""
    columns = {
        "nulls": pyarrow.array(["a", None]),
        "only nulls": pyarrow.nulls(3),
        "numbers": pyarrow.array([1, 2]),
        "lists": pyarrow.array([["a"], []]),
        "structs": pyarrow.array([{"text": "a"}]),
        "bytes": pyarrow.array([b"\xff\xfe"]),
        "invalid UTF-8": pyarrow.array([b"\xff\xfe"]).view(pyarrow.string()),
        "a dictionary": pyarrow.array(["a", "a"]).dictionary_encode(),
        "no rows": pyarrow.array([], pyarrow.string()),
        "large strings": pyarrow.array(["a"], pyarrow.large_string()),
        "a million blanks": pyarrow.array(["a" + " " * 1_000_000 + "b"]),
        "surrogates": pyarrow.array([b"\xed\xa0\x80"]).view(pyarrow.string()),
    }
    name = rng.choice(list(columns))
    column = rng.choice(["text", "text", "text", "content"])
    pyarrow.parquet.write_table(pyarrow.table({column: columns[name]}), path)
    return f"{column} = {name}"


def flip_bits(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(min(len(content), 1 << 14)) for _ in range(rng.choice((1, 1, 20)))] if content else []
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"flipped bits at {places}"


def truncate(path: Path, rng: random.Random) -> str:
    size = rng.choice((0, 1, 8, path.stat().st_size // 2, max(0, path.stat().st_size - 1)))
    os.truncate(path, size)
    return f"truncated to {size}"


def overwrite(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start, size = rng.randrange(len(content) + 1), rng.choice((1, 16, 4096))
    content[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b"", b"\x1b]0;x\x07"))
    path.write_bytes(content)
    return f"overwritten {size} at {start}"


def replace(path: Path, rng: random.Random) -> str:
    """Put something else in the file's place."""
    path.unlink()
    kind = rng.choice(("nothing", "a pipe", "a folder", "a loop of links", "a link to /dev/zero", "another file"))
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "a link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif kind == "another file":
        path.write_text("null")
    return kind


CHANGES: list[Callable[[Path, random.Random], str]] = [flip_bits, truncate, overwrite, replace]
