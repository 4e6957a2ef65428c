"""Saved state: one folder per step, complete or absent, found and verified before it is used.

    <stage>_checkpoints/<tag>/step_NNNNNN/  model.safetensors  optimizer.safetensors  meta.json  SHA256SUMS

There is no loader's position and no random state to save: the batches of a step, and what RL samples at it, are
functions of the step.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat import paths
from nanochat.errors import UserError
from nanochat.model.gpt import ARCHITECTURE, GPT, GPTConfig
from nanochat.stages import STAGES
from nanochat.tokenizer import Tokenizer

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
META_FILE = "meta.json"
SUMS_FILE = "SHA256SUMS"
"""As coreutils' sha256sum writes and checks it."""
WEIGHTS = (META_FILE, MODEL_FILE)
"""What is read to use a model; to train it further, the optimizer's file too."""
REQUIRED_META = {"architecture", "source", "saved_at"}


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

    def damage(self, files: Sequence[str] = (*WEIGHTS, OPTIMIZER_FILE)) -> str | None:
        """What is wrong with these files, in a few words; None if they are as they were written.

        Reads all of them. SHA-256 because CPUs have instructions for it: 1.4 GB/s on one x86 core, where BLAKE2b,
        the fast one without them, made 0.7; that is 4 s for the 5.2 GB of depth 20.
        """
        if not self.is_readable():
            return f"{META_FILE} cannot be read"
        if not (self.folder / SUMS_FILE).exists():
            return f"it has no {SUMS_FILE}"
        try:
            lines = (self.folder / SUMS_FILE).read_text().splitlines()
            sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
            for name in files:
                if name not in sums:
                    return f"{SUMS_FILE} does not list {name}"
                if sha256(self.folder / name) != sums[name]:
                    return f"{name} is not as it was written"
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def describe(self) -> str:
        """For a person: `sft d4 step 300`."""
        return f"{self.source} {self.tag} step {self.step}"

    def load_model(self, device: torch.device, compute_dtype: torch.dtype, tokenizer: Tokenizer) -> GPT:
        """The model with its weights. Raises UserError as `untrained_model` and `load_weights` do."""
        model = self.untrained_model(device, compute_dtype, tokenizer)
        self.load_weights(model)
        return model

    def untrained_model(self, device: torch.device, compute_dtype: torch.dtype, tokenizer: Tokenizer) -> GPT:
        """A model of its shape. Reads none of its files once `meta` is known.

        Raises UserError if it is of another architecture or belongs to another tokenizer.
        """
        if self.meta["architecture"] != ARCHITECTURE:
            raise UserError(
                f"{self.folder} holds a {self.meta['architecture']} model and this code runs {ARCHITECTURE}: "
                "check out the commit named in its meta.json"
            )
        if self.meta["tokenizer"] != tokenizer.hash:
            raise UserError(
                f"{self.folder} was trained with another tokenizer than {paths.tokenizer_dir()}: put that one back, "
                f"or train again with {STAGES[self.source].script} --fresh"
            )
        with torch.device(device):
            return GPT(GPTConfig(**self.meta["model_config"]), compute_dtype)

    def load_weights(self, model: GPT) -> None:
        """Give `model`, made by `untrained_model`, its weights. Raises UserError if they are damaged or not there."""
        model.load_state_dict(self._load(MODEL_FILE, model.device))

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


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def saved_steps(folder: Path) -> list[Checkpoint]:
    """What bears a checkpoint's name in the folder of one model, oldest first, readable or not."""
    if not folder.is_dir():
        return []
    found = (Checkpoint(entry) for entry in folder.iterdir() if re.fullmatch(r"step_\d{6,}", entry.name))
    return sorted(found, key=lambda c: c.step)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints of one model, oldest first. Other files, and steps whose meta.json is damaged, do not matter."""
    return [candidate for candidate in saved_steps(folder) if candidate.is_readable()]


def newest(source: str, tag: str | None = None, step: int | None = None) -> Checkpoint | None:
    """The last step of the model `tag` of a stage; without a tag, of the model that was saved last.

    Models that were set aside, in aside/<tag>.<time>, count only where a tag names one of them.
    """
    folder = paths.checkpoints_dir(source)
    folders = [folder / tag] if tag else list(folder.iterdir()) if folder.is_dir() else []
    found = ([c for c in checkpoints(folder) if step in (None, c.step)] for folder in folders)
    return max((of_tag[-1] for of_tag in found if of_tag), key=lambda c: float(c.meta["saved_at"]), default=None)


class Sound(NamedTuple):
    """The newest checkpoint whose files are as they were written, and what had to be passed over for it."""

    checkpoint: Checkpoint | None
    """None: there is none, sound or damaged"""
    damaged: list[Checkpoint]
    notes: list[str]
    """a sentence for each damaged one"""


def newest_sound(
    source: str, tag: str | None = None, step: int | None = None, *, files: Sequence[str] = (*WEIGHTS, OPTIMIZER_FILE)
) -> Sound:
    """As `newest`, with these files checked, so that what cannot be trusted is not used.

    Raises UserError if the step asked for is damaged, or if all that there are.
    """
    found = newest(source, tag, step)
    if not found:
        return Sound(None, [], [])
    damaged: list[Checkpoint] = []
    notes: list[str] = []
    for candidate in reversed(saved_steps(found.folder.parent)):
        if step in (None, candidate.step):
            damage = candidate.damage(files)
            if not damage:
                return Sound(candidate, damaged, notes)
            damaged.append(candidate)
            notes.append(f"{candidate.folder} is damaged ({damage})")
    raise UserError(
        f"{notes[0]}" + (", and so are those before it" if len(notes) > 1 else "") + ": restore one from an archive, "
        f"or move {found.folder.parent} away and run {STAGES[source].script}"
    )


def find(source: str | None, tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint a user means, its weights checked; without a source, of the most advanced stage there is.

    A damaged one is named, and the one before it taken. Raises UserError if there is none, with the script to run.
    """
    for candidate in [source] if source else list(reversed(STAGES)):
        sound = newest_sound(candidate, tag, step, files=WEIGHTS)
        for note in sound.notes:
            print(f"note: {note}, so the one before it is used", file=sys.stderr)
        if sound.checkpoint:
            return sound.checkpoint
    wanted = f"{source} checkpoint" if source else "checkpoint"
    wanted += (f" tagged {tag}" if tag else "") + (f" at step {step}" if step is not None else "")
    remedy = f"run {STAGES[source or 'base'].script} first"
    if tag or step is not None:
        remedy += ", or name one that ./nanochat.sh checkpoints lists"
    raise UserError(f"there is no {wanted} in {paths.base_dir()}: {remedy}")
