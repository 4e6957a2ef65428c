"""Where things are kept on disk. Everything lives under one base directory."""

import os
from pathlib import Path

from nanochat.errors import UserError

CHECKPOINT_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}


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
    if source not in CHECKPOINT_FOLDERS:
        raise UserError(f"unknown source {source!r}: choose one of {', '.join(CHECKPOINT_FOLDERS)}")
    return base_dir() / CHECKPOINT_FOLDERS[source]


def locks_dir() -> Path:
    """Folder of the locks that keep a second run off a model."""
    return base_dir() / "locks"


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
