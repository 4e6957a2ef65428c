"""Saved state: a folder a step, whole or not there.

    <stage>_checkpoints/<tag>/step_NNNNNN/  model.safetensors  optimizer.safetensors  meta.json

There is no random state to save: the batches of a step, and what RL samples at it, are functions of the step.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import paths
from nanochat.errors import UserError
from nanochat.gpt import ARCHITECTURE, GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
META_FILE = "meta.json"
REQUIRED_META = {"architecture", "source", "saved_at"}
SCRIPTS = {"base": "./pretrain.sh", "mid": "./midtrain.sh", "sft": "./sft.sh", "rl": "./rl.sh"}
"""The script that makes the checkpoints of each stage."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved step."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.folder.name.removeprefix("step_"))

    @property
    def tag(self) -> str:
        """Which model of the stage, such as d20."""
        return self.folder.parent.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What meta.json says."""
        return json.loads((self.folder / META_FILE).read_text())

    @property
    def source(self) -> str:
        """The stage: base, mid, sft or rl."""
        return str(self.meta["source"])

    def is_readable(self) -> bool:
        """Whether meta.json is there and says what a checkpoint is found by."""
        try:
            return self.meta.keys() >= REQUIRED_META
        except (OSError, ValueError, AttributeError):  # no file, no JSON, no object
            return False

    def describe(self) -> str:
        """For a person: `sft d4 step 300`."""
        return f"{self.source} {self.tag} step {self.step}"

    def load_model(self, device: torch.device, compute_dtype: torch.dtype, tokenizer: Tokenizer) -> GPT:
        """The model with its weights.

        Raises UserError if it is of another architecture, belongs to another tokenizer, or is damaged.
        """
        if self.meta["architecture"] != ARCHITECTURE:
            raise UserError(
                f"{self.folder} holds a {self.meta['architecture']} model and this code runs {ARCHITECTURE}: "
                "check out the commit named in its meta.json"
            )
        if self.meta["tokenizer"] != tokenizer.hash:
            raise UserError(
                f"{self.folder} was trained with another tokenizer than {paths.tokenizer_dir()}: put that one back, "
                f"or train again with {SCRIPTS[self.source]} --fresh"
            )
        with torch.device(device):
            model = GPT(GPTConfig(**self.meta["model_config"]), compute_dtype)
        model.load_state_dict(self._load(MODEL_FILE, device))
        return model

    def load_optimizer(self, device: torch.device) -> dict[str, Tensor]:
        """The optimizer's tensors. Raises UserError if they are damaged or not there."""
        return self._load(OPTIMIZER_FILE, device)

    def _load(self, name: str, device: torch.device) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name, device=str(device))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): delete {self.folder} to go on from the one before"
            ) from None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints of one model, oldest first. Other files, and steps whose meta.json is damaged, do not matter."""
    if not folder.is_dir():
        return []
    found = (Checkpoint(entry) for entry in folder.iterdir() if re.fullmatch(r"step_\d{6,}", entry.name))
    return sorted((candidate for candidate in found if candidate.is_readable()), key=lambda c: c.step)


def newest(source: str, tag: str | None = None, step: int | None = None) -> Checkpoint | None:
    """The last step of the model `tag` of a stage; without a tag, of the model that was saved last.

    Models that were set aside, in aside/<tag>.<time>, count only where a tag names one of them.
    """
    folder = paths.checkpoints_dir(source)
    folders = [folder / tag] if tag else list(folder.iterdir()) if folder.is_dir() else []
    found = ([c for c in checkpoints(folder) if step in (None, c.step)] for folder in folders)
    return max((of_tag[-1] for of_tag in found if of_tag), key=lambda c: float(c.meta["saved_at"]), default=None)


def find(source: str | None, tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint a user means; without a source, of the most advanced stage there is.

    Raises UserError if there is none, saying which script makes it.
    """
    for candidate in [source] if source else list(reversed(paths.CHECKPOINT_FOLDERS)):
        checkpoint = newest(candidate, tag, step)
        if checkpoint:
            return checkpoint
    wanted = " ".join(
        [source or "", *([f"tagged {tag}"] if tag else []), *([f"at step {step}"] if step is not None else [])]
    ).strip()
    script = SCRIPTS[source or "base"]
    raise UserError(f"there is no {wanted + ' ' if wanted else ''}checkpoint in {paths.base_dir()}: run {script} first")


def save(
    folder: Path, step: int, model: GPT, optimizer_state: dict[str, Tensor], meta: dict[str, Any], keep_last: int
) -> Checkpoint:
    """Write `folder`/step_NNNNNN, complete before it bears that name, then remove all but the last `keep_last`.

    Raises UserError if the disk is full or not writable; older checkpoints are untouched then.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / MODEL_FILE)
        save_file({name: tensor.contiguous() for name, tensor in optimizer_state.items()}, partial / OPTIMIZER_FILE)
        complete = {"architecture": ARCHITECTURE, "step": step, "saved_at": time.time(), "commit": commit(), **meta}
        (partial / META_FILE).write_text(json.dumps(complete, indent=2, default=str) + "\n")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the checkpoint could not be written to {folder} ({error}): make room and run again") from None
    for old in checkpoints(folder)[:-keep_last]:
        # The save has succeeded whatever comes of this. Renamed first, what cannot be removed is no broken checkpoint.
        with contextlib.suppress(OSError):
            shutil.rmtree(old.folder.rename(folder / f".{old.folder.name}.old"))
    return Checkpoint(final)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit() -> str:
    """The code's commit, with -dirty where files differ from it; `unknown` outside a git checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
