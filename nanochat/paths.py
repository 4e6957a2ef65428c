"""Where things are kept on disk. Everything lives under one base directory."""

import os
from pathlib import Path

from nanochat.errors import UserError
from nanochat.stages import STAGES


def base_dir() -> Path:
    """The folder that holds everything: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.

    Raises UserError if it cannot be created or written to.
    """
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot use {path} as the base directory ({error.strerror}): "
            "set NANOCHAT_BASE_DIR to a folder you can write to"
        ) from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: set NANOCHAT_BASE_DIR to a folder you can write to")
    return path


def tokenizer_dir() -> Path:
    """Folder of the tokenizer's files."""
    return base_dir() / "tokenizer"


def tokens_dir(dataset: str) -> Path:
    """Folder of the token files made from `dataset` (a data set's or a mixture's name)."""
    return base_dir() / "tokens" / dataset


def data_dir(dataset: str) -> Path:
    """Folder of the text of `dataset`, as downloaded."""
    return base_dir() / "data" / dataset


def checkpoints_dir(source: str) -> Path:
    """Folder of the checkpoints of one stage: base, mid, sft or rl. Raises UserError on another name."""
    if source not in STAGES:
        raise UserError(f"unknown source {source!r}: choose one of {', '.join(STAGES)}")
    return base_dir() / STAGES[source].checkpoint_folder


def run_lock(source: str, tag: str) -> Path:
    """Lock file that a run of this model holds."""
    return base_dir() / "locks" / f"{source}-{tag}.lock"


def identity_file() -> Path:
    """The identity conversations, JSON Lines, the user's to edit."""
    return base_dir() / "identity_conversations.jsonl"


def words_file() -> Path:
    """Frequent words of the pretraining text, one a line."""
    return base_dir() / "words.txt"


def eval_bundle_dir() -> Path:
    """Folder of the tasks of CORE."""
    return base_dir() / "eval_bundle"


def report_dir() -> Path:
    """Folder of the report and its plots."""
    return base_dir() / "report"
