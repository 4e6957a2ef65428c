"""Decide where a run starts: its own newest checkpoint, the previous stage, or scratch.

The main process reads the disk and decides for all.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from nanochat import locks, paths
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.stages import STAGES, previous
from nanochat.telemetry.console import LOG_FILE, LogFile
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import META_FILE, Checkpoint
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions, check_resumable
from nanochat.train.run import TrainingRun

RESUMED = (
    "run_id", "parent", "data", "first_row", "results", "evaluated", "saved_at", "best", "bpb_before", "skipped_steps",
    "tracker_id",
)  # fmt: skip
"""Fields of TrainingRun that a resumed run takes from meta.json."""


def parent_of(source: str, tag: str | None, runtime: Runtime, *, fresh: bool = False) -> Checkpoint:
    """The checkpoint that stage `source` starts from: the newest undamaged one of the previous stage.

    If that is gone, or only older ones than the run started from are left, return the newest checkpoint of `source`
    itself (unless `fresh`): a run can continue without its parent. Raises UserError, naming the script to run, if both
    are missing.
    """
    return runtime.world.call_on_main(lambda: _parent(source, tag, fresh))


def continued(tag: str, runtime: Runtime) -> Checkpoint:
    """The base checkpoint that --from names. Raises UserError if there is none."""
    return runtime.world.call_on_main(lambda: checkpoint.find("base", tag))


def _parent(source: str, tag: str | None, fresh: bool) -> Checkpoint:
    def own(tag: str | None) -> Checkpoint | None:
        return None if fresh else checkpoint.newest_verified(source, tag, files=[META_FILE])[0]

    before = previous(source).name
    try:
        parent = checkpoint.find(before, tag)
    except UserError:
        existing = own(tag)
        if not existing:
            raise
        print(f"note: the {before} checkpoint that {existing.describe()} started from is gone or damaged: continuing")
        return existing
    existing = own(tag or parent.tag)
    used = existing and existing.meta["parent"]
    is_older = used and parent.meta.get("run_id") == used.get("run_id") and parent.step < used["step"]
    return existing if existing and is_older else parent


def start_or_resume(
    source: str,
    options: TrainOptions,
    runtime: Runtime,
    tokenizer: Tokenizer,
    *,
    parent: Checkpoint | None = None,
    config: GPTConfig | None = None,
    data: str | None = None,
    first_row: int = 0,
    matrix_lr: float | None = None,
) -> TrainingRun:
    """Resume the newest checkpoint of this model, or start from the weights of `parent` or with shape `config`.

    `matrix_lr`: Muon's learning rate of a new run whose options give none; a resumed run keeps its own.
    With a parent of the same stage, the optimizer continues from its state. A run with a different parent or different
    conversations (`data`) starts over and sets the old checkpoints aside, which costs minutes or hours. Pretraining
    takes days, so different text is an error instead. Raises UserError if the checkpoint has a different shape,
    tokenizer or options, or if the device does not support FP8.
    """
    if options.fp8 and not runtime.has_fp8:
        raise UserError(
            "--fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), got "
            f"{runtime.describe()}: leave it out"
        )
    if options.fp8 and not (runtime.can_compile() if options.compile is None else options.compile):
        raise UserError("--fp8 is several times slower without torch.compile: leave out --compile False, or --fp8")
    tag = options.model_tag or (parent.tag if parent else f"d{config.n_layer}" if config else "")
    paths.check_tag(tag)
    ancestry: dict[str, Any] | None = None
    if parent and (parent.source, parent.tag) == (source, tag):  # the run itself, see parent_of
        ancestry = parent.meta["parent"]
    elif parent:
        ancestry = parent.identity
    may_restart = parent is not None and parent.source != source

    existing = runtime.world.call_on_main(
        lambda: _own_checkpoint(source, tag, options.fresh, ancestry, data, may_restart)
    )
    if matrix_lr is not None and options.matrix_lr is None:
        kept = existing.meta["options"].get("matrix_lr") if existing else matrix_lr
        options = dataclasses.replace(options, matrix_lr=kept)
    if existing:
        return _resume(existing, options, runtime, tokenizer, config)
    if parent:
        if runtime.world.is_main and parent.step < parent.meta["num_iterations"]:
            print(f"note: {parent.describe()} is unfinished ({parent.meta['num_iterations']} steps were planned)")
        model = _load_model(parent, runtime, tokenizer)
    else:
        assert config is not None
        torch.manual_seed(options.seed)
        with torch.device(runtime.device):
            model = GPT(config, runtime.compute_dtype)
        runtime.world.broadcast(model.parameters())  # other kinds of machines may draw different weights
    optimizer = MuonAdamW(model, optimizer_options(options), runtime.world)
    if parent and parent.source == source and "origin" not in parent.meta:  # imported models have no state
        _load_optimizer(optimizer, parent, runtime)
    return TrainingRun(source, tag, options, runtime, tokenizer.hash, model, optimizer, ancestry, data, first_row)


def _own_checkpoint(
    source: str, tag: str, fresh: bool, ancestry: dict[str, Any] | None, data: str | None, may_restart: bool
) -> Checkpoint | None:
    """Lock the model and return the checkpoint to resume; None after setting aside what a new start replaces."""
    holder = locks.hold(paths.run_lock(source, tag))
    if holder:
        raise UserError(
            f"{holder} is training the {source} model {tag}: wait for it, stop it with kill -INT, or choose "
            "another name with --model-tag"
        )
    folder = paths.checkpoints_dir(source) / tag
    checkpoint.remove_leftovers(folder)
    restart = f"start over with {STAGES[source].script} --fresh"
    if not fresh:
        existing = _newest_verified(source, tag)
        if not existing and checkpoint.saved_steps(folder):
            raise UserError(f"no checkpoint in {folder} is readable: restore one from an archive, or {restart}")
        if existing and checkpoint.is_same(existing.meta["parent"], ancestry) and existing.meta["data"] == data:
            return existing
        if existing and not may_restart:
            if existing.meta["data"] == data:
                raise UserError(
                    f"{existing.folder} was started from another checkpoint: choose a new name with --model-tag, "
                    f"or {restart}"
                )
            raise UserError(
                f"{existing.folder} was trained on {existing.meta['data']}, but the text prepared now is {data}: "
                f"prepare the former again, or {restart}"
            )
    if checkpoint.saved_steps(folder):
        aside = folder.parent / paths.ASIDE / time.strftime(f"{tag}.%Y%m%d-%H%M%S")
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(
            f"set aside the existing {source} model {tag} in {aside}; to restore it, stop this run, move {folder} away "
            f"if it exists, and: mv {aside} {folder}"
        )
    return None


def _newest_verified(source: str, tag: str) -> Checkpoint | None:
    """The checkpoint to resume. Damaged ones are renamed, so that they do not count toward those to keep."""
    found, skipped = checkpoint.newest_verified(source, tag)
    for damaged, note in skipped:
        kept = damaged.folder.with_name(f"{damaged.folder.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        damaged.folder.rename(kept)
        line = f"note: {note}, using the one before it; kept as {kept.name}"
        print(line)
        LogFile(kept.parent / LOG_FILE).print(line)
    return found


def _resume(
    existing: Checkpoint, options: TrainOptions, runtime: Runtime, tokenizer: Tokenizer, config: GPTConfig | None
) -> TrainingRun:
    model = _load_model(existing, runtime, tokenizer)
    if config:  # a run of nanochat-1 keeps its soft-cap
        config = dataclasses.replace(config, logit_softcap=model.config.logit_softcap)
    if config and model.config != config:
        asked, found = dataclasses.asdict(config), dataclasses.asdict(model.config)
        other = ", ".join(f"{name} {found[name]}, not {asked[name]}" for name in asked if asked[name] != found[name])
        raise UserError(
            f"{existing.folder} holds a model of a different shape ({other}): resume with its options, start over "
            f"with {STAGES[existing.source].script} --fresh, or choose a new name with --model-tag"
        )
    meta = existing.meta
    check_resumable(options, meta["options"])
    optimizer = MuonAdamW(model, optimizer_options(options), runtime.world)
    _load_optimizer(optimizer, existing, runtime)
    saved = {name: meta[name] for name in RESUMED if name in meta}
    run = TrainingRun(existing.source, existing.tag, options, runtime, tokenizer.hash, model, optimizer, **saved)
    run.step, run.previous_seconds = existing.step, meta["seconds"]
    return run


def _load_model(saved: Checkpoint, runtime: Runtime, tokenizer: Tokenizer) -> GPT:
    """Load a model in every process. Only the main one reads the files, so other machines do not need them."""
    model = saved.empty_model(runtime.device, runtime.compute_dtype, tokenizer)
    runtime.world.call_on_main(lambda: saved.load_weights(model))
    runtime.world.broadcast(model.parameters())
    return model


def _load_optimizer(optimizer: MuonAdamW, saved: Checkpoint, runtime: Runtime) -> None:
    """Load the optimizer's state, which only the main process reads."""
    state: dict[str, Tensor] = {}
    runtime.world.call_on_main(lambda: state.update(saved.load_optimizer()))
    optimizer.load_full_state(state)


def optimizer_options(options: TrainOptions) -> OptimizerOptions:
    """The optimizer's part of a stage's options; None keeps the optimizer's default."""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay")
    return OptimizerOptions(**{name: v for name in names if (v := getattr(options, name)) is not None})
