"""Check that all machines of a run have the same options, code, versions and data.

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

NAME = "NANOCHAT_HOST"  # environment variable with this machine's name in --hosts
ROOT = Path(__file__).resolve().parent.parent.parent
HOST, FOLDER, OPTIONS, CODE, SOFTWARE, DATA = "host", "folder", "options", "code", "Python and torch", "own data"
"""Keys of a machine's facts; the others are paths below the base directory, with digests as values."""

TEXT = ("tokenizer", "tokens")
CONVERSATIONS = ("tokenizer", "data", "mixtures.yaml", "identity_conversations.jsonl", "words.txt")
"""Data that pretraining and the later stages read from the base directory. Every machine writes its own token files
of the conversations."""


def check(reads: Collection[str], data: str = "") -> None:
    """Compare all processes with the main one; a collective call. Raises UserError in all of them on a difference.

    `reads`: TEXT or CONVERSATIONS; `data`: fingerprint of a mixture. Large files, such as tokens, are compared by their
    sizes and the small files that describe them.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # torchrun's number of machines
        return
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, facts(reads) | {DATA: data})
    for other in everyone:
        if problem := difference(everyone[0], other):
            dist.destroy_process_group()  # joins gloo's threads, which may abort a process that exits
            raise UserError(problem)


def facts(reads: Collection[str]) -> dict[str, str]:
    """Facts about this machine for a run that reads `reads`."""
    code = [path for folder in ("nanochat", "scripts") for path in (ROOT / folder).rglob("*.py")]
    return {
        HOST: os.environ.get(NAME, socket.gethostname()),
        FOLDER: str(paths.base_dir()),
        OPTIONS: " ".join(sys.argv[1:]),
        CODE: _digest(code),
        SOFTWARE: f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__.split('+')[0]}",
        **{name: digest for name, digest in files(paths.base_dir()).items() if name.split("/")[0] in reads},
    }


def files(base: Path) -> dict[str, str]:
    """Digests of the files that training reads, by path below `base`."""
    found = {}
    for folder in (index.parent for index in base.glob("tokens/*/train.shards.json")):
        lists = [*folder.glob("*.shards.json")]
        names = {name for path in lists for name in json.loads(path.read_text())["shards"]}
        shards = [path for name in names for path in folder.glob(f"{name}.*")]
        found[f"tokens/{folder.name}"] = _digest(lists + shards)
    for manifest in base.glob(f"data/*/{MANIFEST_FILE}"):
        # Text is not read again once it is tokenized, but the conversations of the later stages are.
        if f"tokens/{manifest.parent.name}" not in found:
            kept = json.loads(manifest.read_text())  # without the times of verification
            listed = [(name, file["size"], file["sha256"]) for name, file in sorted(kept["files"].items())]
            content = json.dumps([kept["repository"], listed]).encode()
            found[f"data/{manifest.parent.name}"] = hashlib.sha256(content).hexdigest()[:16]
    for name in ("tokenizer", *CONVERSATIONS[2:]):
        if (path := base / name).exists():
            found[name] = _digest(path.rglob("*") if path.is_dir() else [path])
    return found


def difference(main: dict[str, str], other: dict[str, str]) -> str | None:
    """The first difference that prevents training together, with its fix; None if there is none."""
    there = other[HOST]
    if other[OPTIONS] != main[OPTIONS]:
        return f"all machines need the same options: {other[OPTIONS]} on {there}, {main[OPTIONS]} on {main[HOST]}"
    if other[CODE] != main[CODE]:
        copy = shlex.join(["rsync", "-a", "--delete", "--exclude=.venv", f"{ROOT}/", f"{there}:{ROOT}/"])
        return f"{there} has different code from {main[HOST]}: copy it with {copy}"
    if other[SOFTWARE] != main[SOFTWARE]:
        return f"{there} has {other[SOFTWARE]}, {main[HOST]} has {main[SOFTWARE]}: run ./setup.sh there"
    if other.get(DATA) != main.get(DATA):
        return f"the files of --add, --task or mixtures.yaml on {there} differ from those on {main[HOST]}: copy them"
    missing = sorted(name for name in main.keys() - {HOST, FOLDER} if other.get(name) != main[name])
    if missing:
        sources = [f"{main[FOLDER]}/./{name}" for name in missing]  # the part after /./ is the path there
        copy = shlex.join(["rsync", "-a", "--relative", *sources, f"{there}:{other[FOLDER]}/"])
        return f"{', '.join(missing)} of {main[HOST]} missing or different on {there}: copy with {copy}"
    return None


def _digest(files: Iterable[Path]) -> str:
    """Digest of names, sizes and contents; tokens, which are large, count by their size."""
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix not in (".ids", ".offsets", ".mask"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
