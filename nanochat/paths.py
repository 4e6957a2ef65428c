"""Locations on disk, all below one base directory."""

import os
import re
from pathlib import Path

from nanochat.errors import UserError
from nanochat.stages import STAGES

ASIDE = "aside"  # folder, next to the models of a stage, with the ones that --fresh replaced
MANIFEST_FILE = "manifest.json"
"""Names, sizes and checksums of the files in a download folder (nanochat.data.download)."""


def base_dir() -> Path:
    """$NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. May be read-only. Raises UserError if it cannot be created."""
    path = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    try:
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError) as error:  # without a home directory
        raise UserError(
            f"cannot use {path} as the base directory ({getattr(error, 'strerror', error)}): set NANOCHAT_BASE_DIR to "
            "a folder you can write to"
        ) from None


def demo_option() -> str:
    """` --demo` in the demo's folder, else nothing: for commands in messages."""
    return " --demo" if os.environ.get("NANOCHAT_DEMO") else ""


def tokenizer_dir() -> Path:
    return base_dir() / "tokenizer"


def tokens_dir(dataset: str) -> Path:
    return base_dir() / "tokens" / dataset


def data_dir(dataset: str) -> Path:
    return base_dir() / "data" / dataset


def checkpoints_dir(source: str) -> Path:
    """Checkpoints of one stage: base, mid, sft or rl. Raises UserError for another name."""
    if source not in STAGES:
        raise UserError(f'source must be one of {", ".join(STAGES)}, got "{source}"')
    return base_dir() / STAGES[source].checkpoint_folder


def check_tag(tag: str, option: str = "--model-tag") -> str:
    """Return `tag`, the name of a model and its folder. Raises UserError if it could name another folder."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", tag) or tag == ASIDE:
        wanted = f'consist of at most 100 letters, digits, dots and dashes, and not be "{ASIDE}"'
        raise UserError(f"{option} must {wanted}, got {tag!r}: try d20-new")
    return tag


def run_lock(source: str, tag: str) -> Path:
    return base_dir() / "locks" / f"{source}-{tag}.lock"


def identity_file() -> Path:
    """Identity conversations, a JSON Lines file that the user may edit."""
    return base_dir() / "identity_conversations.jsonl"


def mixtures_file() -> Path:
    """Data of the stages after pretraining, a YAML file that the user may edit."""
    return base_dir() / "mixtures.yaml"


def words_file() -> Path:
    """Frequent words of the pretraining text, one per line."""
    return base_dir() / "words.txt"


def report_dir() -> Path:
    return base_dir() / "report"
