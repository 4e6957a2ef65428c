"""What the machines of one run have to have in common, and what to copy where they do not.

Checkpoints are not among it: the main process alone reads and writes them.
"""

import hashlib
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import paths
from nanochat.data.download import MANIFEST_FILE
from nanochat.errors import UserError

NAME = "NANOCHAT_HOST"
"""The environment variable with what --hosts calls this machine."""
ROOT = Path(__file__).resolve().parent.parent.parent
HOST, FOLDER, OPTIONS, CODE, SOFTWARE = "host", "folder", "options", "code", "Python and torch"
"""Beside these a machine's facts are its files: path below the base directory, and digest."""

TEXT = ("tokenizer", "tokens")
CONVERSATIONS = ("tokenizer", "data", "identity_conversations.jsonl", "words.txt")
"""What pretraining and what the later stages read below the base directory. Token files of conversations are made by
each machine itself, and are the same because the conversations are."""


def check(reads: Collection[str]) -> None:
    """Compare all processes, none of which may be left out. Raises UserError in each if one differs from the main one.

    `reads`: TEXT or CONVERSATIONS. It is cheap: what is long, such as token files, goes by its sizes and by the small
    files that describe it.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # torchrun's number of machines
        return
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, facts(reads))
    main = everyone[0]
    problems = [problem for other in everyone[1:] if (problem := difference(main, other))]
    if problems:
        dist.destroy_process_group()  # gloo's threads abort a process that ends before they do
        raise UserError(problems[0])


def facts(reads: Collection[str]) -> dict[str, str]:
    """What describes this machine for a run that reads `reads`."""
    torch_version = torch.__version__.split("+")[0]
    return {
        HOST: os.environ.get(NAME, socket.gethostname()),
        FOLDER: str(paths.base_dir()),
        OPTIONS: " ".join(sys.argv[1:]),
        CODE: _digest(sorted(path for room in ("nanochat", "scripts") for path in (ROOT / room).rglob("*.py"))),
        SOFTWARE: f"Python {'.'.join(platform.python_version_tuple()[:2])}, torch {torch_version}",
        **{name: digest for name, digest in files(paths.base_dir()).items() if name.split("/")[0] in reads},
    }


def files(base: Path) -> dict[str, str]:
    """What training reads below `base`, as path and digest."""
    texts = [index.parent for index in sorted(base.glob("tokens/*/train.shards.json"))]
    found = {f"tokens/{folder.name}": _digest_of_tokens(folder) for folder in texts}
    if (base / "tokenizer").is_dir():
        found["tokenizer"] = _digest(sorted(path for path in (base / "tokenizer").rglob("*") if path.is_file()))
    # Text is not read again once there are tokens of it; the conversations of the later stages are.
    manifests = [
        path for path in sorted(base.glob(f"data/*/{MANIFEST_FILE}")) if base / "tokens" / path.parent.name not in texts
    ]
    found |= {f"data/{path.parent.name}": _digest_of_manifest(path) for path in manifests}
    singles = [base / "identity_conversations.jsonl", base / "words.txt"]
    return found | {path.name: _digest([path]) for path in singles if path.exists()}


def difference(main: dict[str, str], other: dict[str, str]) -> str | None:
    """What to do so that `other` can train together with `main`; None if it can."""
    there = other[HOST]
    if other[OPTIONS] != main[OPTIONS]:
        return f"{there} was started with other options ({other[OPTIONS]}) than {main[HOST]} ({main[OPTIONS]})"
    if other[CODE] != main[CODE]:
        copy = shlex.join(["rsync", "-a", "--delete", "--exclude=.venv", f"{ROOT}/", f"{there}:{ROOT}/"])
        return f"the code on {there} is not that on {main[HOST]}: copy it with {copy}"
    if other[SOFTWARE] != main[SOFTWARE]:
        return f"{there} has {other[SOFTWARE]}, and {main[HOST]} has {main[SOFTWARE]}: run ./setup.sh there"
    missing = sorted(name for name in main.keys() - {HOST, FOLDER} if other.get(name) != main[name])
    if missing:
        sources = [f"{main[FOLDER]}/./{name}" for name in missing]  # what follows the dot is its path there
        copy = shlex.join(["rsync", "-a", "--relative", *sources, f"{there}:{other[FOLDER]}/"])
        return f"{there} has another {', '.join(missing)} than {main[HOST]}, or none: copy with {copy}"
    return None


def _digest(contents: Sequence[Path]) -> str:
    """Of files' names and contents."""
    digest = hashlib.sha256()
    for path in contents:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest_of_tokens(folder: Path) -> str:
    """Of the names and sizes of the files of its splits' shards, and the contents of those that describe the others."""
    lists = sorted(folder.glob("*.shards.json"))
    names = {name for path in lists for name in json.loads(path.read_text())["shards"]}
    files = lists + sorted(path for name in names for path in folder.glob(f"{name}.*") if path.suffix != ".partial")
    sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    described = _digest([path for path in files if path.suffix == ".json"])
    return hashlib.sha256((sizes + described).encode()).hexdigest()[:16]


def _digest_of_manifest(path: Path) -> str:
    """Of the repository, and of its files' names, sizes and sha256: when they were checked is each machine's own."""
    kept = json.loads(path.read_text())
    read = [kept["repository"], [(name, file["size"], file["sha256"]) for name, file in sorted(kept["files"].items())]]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]
