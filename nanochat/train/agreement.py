"""Checks that all machines of a run have the same options, code, versions and data.

Checkpoints are not compared: only the main process reads and writes them.
"""

import hashlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import paths
from nanochat.errors import UserError
from nanochat.paths import MANIFEST_FILE

NAME = "NANOCHAT_HOST"
"""Environment variable with this machine's name in --hosts."""
ROOT = Path(__file__).resolve().parent.parent.parent
HOST, FOLDER, OPTIONS, CODE, SOFTWARE = "host", "folder", "options", "code", "Python and torch"
"""Keys of a machine's facts; the others are paths below the base directory, with digests as values."""

TEXT = ("tokenizer", "tokens")
CONVERSATIONS = ("tokenizer", "data", "identity_conversations.jsonl", "words.txt")
"""Read below the base directory by pretraining and by the later stages. Every machine makes the token files of
conversations itself, from the same conversations."""


def check(reads: Collection[str]) -> None:
    """Compare all processes with the main one; a collective call. Raises UserError in all of them on a difference.

    `reads`: TEXT or CONVERSATIONS. Large files, such as tokens, are compared by size and by the small files that
    describe them.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # torchrun's number of machines
        return
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, facts(reads))
    problem = next(filter(None, (difference(everyone[0], other) for other in everyone)), None)
    if problem:
        dist.destroy_process_group()  # gloo's threads abort a process that ends before they do
        raise UserError(problem)


def facts(reads: Collection[str]) -> dict[str, str]:
    """Facts about this machine for a run that reads `reads`."""
    code = sorted(path for folder in ("nanochat", "scripts") for path in (ROOT / folder).rglob("*.py"))
    return {
        HOST: os.environ.get(NAME, socket.gethostname()),
        FOLDER: str(paths.base_dir()),
        OPTIONS: " ".join(sys.argv[1:]),
        CODE: _digest(_described(path) for path in code),
        SOFTWARE: f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__.split('+')[0]}",
        **{name: digest for name, digest in files(paths.base_dir()).items() if name.split("/")[0] in reads},
    }


def files(base: Path) -> dict[str, str]:
    """Digests of the files that training reads, by path below `base`."""
    found = {
        f"tokens/{index.parent.name}": _digest_of_tokens(index.parent)
        for index in base.glob("tokens/*/train.shards.json")
    }
    tokenizer = [path for path in sorted((base / "tokenizer").rglob("*")) if path.is_file()]
    found |= {"tokenizer": _digest(map(_described, tokenizer))} if tokenizer else {}
    for manifest in base.glob(f"data/*/{MANIFEST_FILE}"):
        # Text is not read again once it is tokenized; the conversations of the later stages are.
        if f"tokens/{manifest.parent.name}" not in found:
            found[f"data/{manifest.parent.name}"] = _digest_of_manifest(manifest)
    singles = [base / "identity_conversations.jsonl", base / "words.txt"]
    return found | {path.name: _digest([_described(path)]) for path in singles if path.exists()}


def difference(main: dict[str, str], other: dict[str, str]) -> str | None:
    """The first difference that prevents training together, with its fix; None if all is equal."""
    there = other[HOST]
    if other[OPTIONS] != main[OPTIONS]:
        return f"all machines need the same options: {other[OPTIONS]} on {there}, {main[OPTIONS]} on {main[HOST]}"
    if other[CODE] != main[CODE]:
        copy = shlex.join(["rsync", "-a", "--delete", "--exclude=.venv", f"{ROOT}/", f"{there}:{ROOT}/"])
        return f"{there} has other code than {main[HOST]}: copy it with {copy}"
    if other[SOFTWARE] != main[SOFTWARE]:
        return f"{there} has {other[SOFTWARE]}, {main[HOST]} has {main[SOFTWARE]}: run ./setup.sh there"
    missing = sorted(name for name in main.keys() - {HOST, FOLDER} if other.get(name) != main[name])
    if missing:
        sources = [f"{main[FOLDER]}/./{name}" for name in missing]  # the part after /./ is the path there
        copy = shlex.join(["rsync", "-a", "--relative", *sources, f"{there}:{other[FOLDER]}/"])
        return f"{there} lacks {', '.join(missing)} of {main[HOST]}, or has another version: copy with {copy}"
    return None


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _described(path: Path) -> bytes:
    """Name, size and contents of a file."""
    content = path.read_bytes()
    return f"{path.name} {len(content)}\n".encode() + content


def _digest_of_tokens(folder: Path) -> str:
    """Digest of the names and sizes of all shards of the splits, and of the contents of their JSON files."""
    lists = sorted(folder.glob("*.shards.json"))
    names = {name for path in lists for name in json.loads(path.read_text())["shards"]}
    files = lists + sorted(path for name in names for path in folder.glob(f"{name}.*") if path.suffix != ".partial")
    return _digest(
        _described(path) if path.suffix == ".json" else f"{path.name} {path.stat().st_size}\n".encode()
        for path in files
    )


def _digest_of_manifest(path: Path) -> str:
    """Digest of repository, file names, sizes and sha256, not of the times of verification."""
    kept = json.loads(path.read_text())
    files = [(name, file["size"], file["sha256"]) for name, file in sorted(kept["files"].items())]
    return _digest([json.dumps([kept["repository"], files]).encode()])
