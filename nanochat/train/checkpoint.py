"""Checkpoints: one folder per step, complete or absent, found and verified before use.

    <stage>_checkpoints/<tag>/step_NNNNNN/  model.safetensors  optimizer.safetensors  meta.json  SHA256SUMS

Neither a loader position nor random state needs saving: the batches of a step, and the replies that RL samples in it,
are functions of the step.
"""

import contextlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import paths
from nanochat.atomic import atomic_folder, fsync, rename_away, sha256
from nanochat.errors import UserError
from nanochat.model.gpt import ARCHITECTURE, GPT, NANOCHAT_1_SOFTCAP, GPTConfig
from nanochat.stages import STAGES
from nanochat.tokenizer import Tokenizer
from nanochat.untrusted import check_regular, check_types, read_json, reading

State = dict[str, Tensor]
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
META_FILE = "meta.json"
SUMS_FILE = "SHA256SUMS"  # in the format of coreutils' sha256sum
WEIGHTS = (META_FILE, MODEL_FILE)  # files needed to use a model; training also needs the optimizer's
ALL_FILES = (*WEIGHTS, OPTIMIZER_FILE)
REQUIRED_META = {"architecture": str, "source": str, "saved_at": float}
MAX_EXIT_WAIT = 1.0  # seconds that a second Ctrl-C waits for a save in progress


@dataclass(frozen=True)
class Checkpoint:
    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step_"))

    @property
    def tag(self) -> str:
        """Name of the model within its stage, such as d20."""
        return self.folder.parent.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_json(self.folder / META_FILE)

    @property
    def source(self) -> str:
        return str(self.meta["source"])

    @property
    def config(self) -> GPTConfig:
        """Shape of the model. Raises UserError if the architecture is unknown."""
        shape, architecture = self.meta["model_config"], self.meta["architecture"]
        if architecture == "nanochat-1":
            shape = shape | {"logit_softcap": NANOCHAT_1_SOFTCAP}
        elif architecture != ARCHITECTURE:
            raise UserError(
                f"{self.folder} holds a {architecture} model, but this code runs {ARCHITECTURE}: check out the commit "
                "named in its meta.json"
            )
        with reading(self.folder / META_FILE, "restore it from an archive"):
            return GPTConfig(**shape)

    @property
    def identity(self) -> dict[str, Any]:
        """The `parent` in the meta.json of a checkpoint that starts from this one; see `is_same`.

        `run_id` stays the same when a run is resumed. It and `digest` are None if unknown.
        """
        digest, run_id = None, self.meta.get("run_id")
        with contextlib.suppress(OSError, ValueError):
            digest = read_sums(self.folder / SUMS_FILE).get(MODEL_FILE)
        known = {"source": self.source, "tag": self.tag, "step": self.step, "saved_at": self.meta["saved_at"]}
        return {**known, "run_id": run_id, "digest": digest}

    def is_readable(self) -> bool:
        """True if meta.json exists and has the required entries."""
        with contextlib.suppress(UserError), reading(self.folder / META_FILE, "not a checkpoint"):
            check_types(self.meta, REQUIRED_META)
            return self.source in STAGES
        return False

    def damage(self, files: Sequence[str] = ALL_FILES) -> str | None:
        """Verify the checksums of `files`: a short description of the first problem, or None.

        SHA-256, because CPUs have instructions for it: 1.4 GB/s on one x86 core (BLAKE2b: 0.7), 4 s for the 5.2 GB of
        depth 20.
        """
        if not self.is_readable():
            return f"{META_FILE} is unreadable"
        try:
            sums = read_sums(self.folder / SUMS_FILE)
            for name in files:
                if name not in sums:
                    return f"{SUMS_FILE} does not list {name}"
                check_regular(self.folder / name)
                if sha256(self.folder / name) != sums[name]:
                    return f"{name} does not match its checksum"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def describe(self) -> str:
        """`sft d4 step 300`."""
        return f"{self.source} {self.tag} step {self.step}"

    def load_model(self, device: torch.device, compute_dtype: torch.dtype, tokenizer: Tokenizer) -> GPT:
        """The model with its weights. Raises UserError like `empty_model` and `load_weights`."""
        model = self.empty_model(device, compute_dtype, tokenizer)
        self.load_weights(model)
        return model

    def empty_model(self, device: torch.device, compute_dtype: torch.dtype, tokenizer: Tokenizer) -> GPT:
        """A freshly initialized model of the checkpoint's shape. Reads only meta.json.

        Raises UserError if the architecture is unknown or the tokenizer differs.
        """
        config = self.config
        if self.meta["tokenizer"] != tokenizer.hash:
            raise UserError(
                f"{self.folder} was trained with a different tokenizer from {paths.tokenizer_dir()}: restore that "
                f"tokenizer, or train again with {STAGES[self.source].script} --fresh"
            )
        with torch.device(device):
            return GPT(config, compute_dtype)

    def load_weights(self, model: GPT) -> None:
        """Load the weights into `model`. Raises UserError if they are damaged or missing."""
        model.load_state_dict(self._load(MODEL_FILE, model.device))

    def load_optimizer(self) -> State:
        """Tensors of `MuonAdamW.full_state`, on the CPU. Raises UserError if they are damaged or missing."""
        return self._load(OPTIMIZER_FILE, torch.device("cpu"))

    def _load(self, name: str, device: torch.device) -> State:
        try:
            return load_file(self.folder / name, device=str(device))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {self.folder / name} ({error}): delete {self.folder} to use the checkpoint before it"
            ) from None


def checkpoint_bytes(config: GPTConfig) -> int:
    """Size of a checkpoint: weights, Muon's momentum and AdamW's two moments of embedding and head, in fp32."""
    embeddings = 2 * config.vocab_size * config.n_embd
    return 4 * (2 * config.num_parameters + embeddings)


def read_sums(path: Path) -> dict[str, str]:
    """Read a file in the format of sha256sum: digests by name."""
    check_regular(path)
    return {name: digest for digest, name in (line.split("  ", 1) for line in path.read_text().splitlines())}


def is_same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """True if both describe the same checkpoint, by the digest of its weights: a clock may have been set back.

    Checkpoints written before parents had a digest are compared by time.
    """
    if one is None or other is None:
        return one is other
    key = "digest" if one.get("digest") and other.get("digest") else "saved_at"
    return one[key] == other[key]


def saved_steps(folder: Path) -> list[Checkpoint]:
    """All step folders of one model, oldest first, readable or not."""
    if not folder.is_dir():
        return []
    found = (Checkpoint(entry) for entry in folder.iterdir() if re.fullmatch(r"step_\d{6,}", entry.name))
    return sorted(found, key=lambda c: c.step)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Readable checkpoints of one model, oldest first."""
    return [candidate for candidate in saved_steps(folder) if candidate.is_readable()]


def newest(source: str, tag: str | None = None, step: int | None = None) -> Checkpoint | None:
    """The last step of model `tag`; without a tag, of that stage's most recently saved model.

    Models that --fresh set aside, in aside/<tag>.<time>, count only if `tag` names one.
    """
    folder = paths.checkpoints_dir(source)
    if tag:
        paths.check_tag(tag.removeprefix(f"{paths.ASIDE}/"))
    folders = [folder / tag] if tag else list(folder.iterdir()) if folder.is_dir() else []
    found = ([c for c in checkpoints(folder) if step in (None, c.step)] for folder in folders)
    return max((of_tag[-1] for of_tag in found if of_tag), key=lambda c: float(c.meta["saved_at"]), default=None)


def newest_verified(
    source: str, tag: str | None = None, step: int | None = None, *, files: Sequence[str] = ALL_FILES
) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """Like `newest`, but verify the checksums of `files` and fall back to older steps.

    Returns None if there are no checkpoints, and the skipped damaged ones with a message for each. Raises UserError if
    the requested step is damaged, or if all are.
    """
    found = newest(source, tag, step)
    if not found:
        return None, []
    skipped: list[tuple[Checkpoint, str]] = []
    for candidate in reversed(saved_steps(found.folder.parent)):
        if step in (None, candidate.step):
            if not (damage := candidate.damage(files)):
                return candidate, skipped
            skipped.append((candidate, f"{candidate.folder} is damaged ({damage})"))
    raise UserError(
        skipped[0][1] + (", and so are the older ones" if len(skipped) > 1 else "") + ": restore one from an archive, "
        f"or move {found.folder.parent} away and run {STAGES[source].script}"
    )


def find(source: str | None, tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint that a user asks for, with its weights verified; without a source, of the most advanced stage.

    Skips damaged ones with a note. Raises UserError, naming the script to run, if there is none.
    """
    for candidate in [source] if source else list(reversed(STAGES)):
        found, skipped = newest_verified(candidate, tag, step, files=WEIGHTS)
        for _, note in skipped:
            print(f"note: {note}, using the one before it", file=sys.stderr)
        if found:
            return found
    wanted = f"{source} checkpoint" if source else "checkpoint"
    wanted += (f" tagged {tag}" if tag else "") + (f" at step {step}" if step is not None else "")
    remedy = f"run {STAGES[source or 'base'].script} first"
    if tag or step is not None:
        remedy += ", or name one that ./nanochat.sh checkpoints lists"
    raise UserError(f"found no {wanted} in {paths.base_dir()}: {remedy}")


class SaveError(Exception):
    """A checkpoint could not be written; older ones are untouched."""


@dataclass
class CheckpointWriter(contextlib.AbstractContextManager["CheckpointWriter"]):
    """Writes the checkpoints of one model in a background thread, one at a time. A context manager.

    Training waits only for the copy to host memory. safetensors releases the GIL while it writes: during a save of
    0.8 GB, another thread was never delayed by more than 9 ms.
    """

    folder: Path
    keep_last: int
    keep_every: int  # each save prunes all but the last `keep_last` and the multiples of this; 0: none
    _thread: threading.Thread | None = None
    _error: Exception | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A second Ctrl-C does not wait for 5 GB to be written. The unfinished folder is not named like a checkpoint.
        if self._thread:
            self._thread.join(MAX_EXIT_WAIT if kind is KeyboardInterrupt else None)

    def start(self, step: int, model_state: State, optimizer_state: State, meta: dict[str, Any]) -> None:
        """Copy the state to host memory and start writing it. The state may change when this returns."""
        self._join()
        model, optimizer = host_copy(model_state), host_copy(optimizer_state)
        self._thread = threading.Thread(target=self._write, args=(step, model, optimizer, meta), daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """Error of a failed save since the last call, if any."""
        error, self._error = self._error, None
        if error and not isinstance(error, SaveError):
            raise error
        return str(error) if error else None

    def finish(self) -> str | None:
        """Wait for the save in progress; return `failure()`."""
        self._join()
        return self.failure()

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, model_state: State, optimizer_state: State, meta: dict[str, Any]) -> None:
        try:
            write(self.folder, step, model_state, optimizer_state, meta)
            prune(self.folder, self.keep_last, self.keep_every, newest_step=step)
        except Exception as error:  # raised again in the training thread
            self._error = error


def host_copy(state: State) -> State:
    copies = {name: tensor.detach().to("cpu", copy=True, non_blocking=True) for name, tensor in state.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: tensor.contiguous() for name, tensor in copies.items()}


def write(folder: Path, step: int, model_state: State, optimizer_state: State, meta: Mapping[str, Any]) -> Checkpoint:
    """Write `folder`/step_NNNNNN, complete and synced to disk before it gets its name. Replaces an existing one.

    Raises SaveError, after removing what was written, if the disk is full or not writable.
    """
    final = folder / f"step_{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(final, replace=True) as partial:  # an existing one is damaged, or lacks its evaluation
            save_file(model_state, partial / MODEL_FILE)
            save_file(optimizer_state, partial / OPTIMIZER_FILE)
            complete = {"architecture": ARCHITECTURE, "step": step, "saved_at": time.time(), **meta}
            (partial / META_FILE).write_text(json.dumps(complete, indent=2, default=str) + "\n")
            sums = [f"{sha256(partial / name)}  {name}\n" for name in (MODEL_FILE, OPTIMIZER_FILE, META_FILE)]
            (partial / SUMS_FILE).write_text("".join(sums))
        fsync(folder.parent)  # for the first checkpoint of a model
    except (OSError, SafetensorError) as error:
        raise SaveError(f"could not write the checkpoint of step {step} to {folder} ({error})") from None
    return Checkpoint(final)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished folders of a run that was killed while saving."""
    for leftover in (*folder.glob(".step_*.partial"), *folder.glob(".step_*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(folder: Path, keep_last: int, keep_every: int, newest_step: int | None = None) -> list[Checkpoint]:
    """Remove all checkpoints of a model except the last `keep_last` up to `newest_step` and multiples of `keep_every`.

    Returns the removed ones. Failure to remove one costs disk space, but does not end the run.
    """
    old = [c for c in checkpoints(folder) if newest_step is None or c.step <= newest_step][:-keep_last]
    return remove([c for c in old if not (keep_every and c.step % keep_every == 0)])


def remove(doomed: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Remove checkpoints; return those that could be removed."""
    removed = []
    for checkpoint in doomed:
        with contextlib.suppress(OSError):
            shutil.rmtree(rename_away(checkpoint.folder))
            removed.append(checkpoint)
    return removed
