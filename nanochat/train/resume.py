"""What a run goes on from: its own newest checkpoint, the stage before, or nothing.

The main process looks and decides, and tells the others.
"""

import dataclasses
import re
import time
from typing import Any

import torch
from torch import Tensor

from nanochat import locks, paths
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.stages import STAGES
from nanochat.telemetry.console import LOG_FILE, LogFile
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import META_FILE, Checkpoint
from nanochat.train.loop import Training
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions, check_same_course
from nanochat.train.saving import remove_leftovers

ASIDE = "aside"
"""The folder, beside those of the models of a stage, that keeps what --fresh replaced."""


def parent_of(source: str, tag: str | None, runtime: Runtime, *, fresh: bool = False) -> Checkpoint:
    """What the stage `source` grows from: the newest sound checkpoint of the stage before.

    Where that is gone, or only older ones than it began with are sound, it is the newest checkpoint of `source` itself,
    unless `fresh`: a run goes on without its parent. Raises UserError, naming the script to run, if there is neither.
    """
    return runtime.world.call_on_main(lambda: _parent(source, tag, fresh))


def _parent(source: str, tag: str | None, fresh: bool) -> Checkpoint:
    stages = list(STAGES)
    before = stages[stages.index(source) - 1]
    try:
        parent = checkpoint.find(before, tag)
    except UserError:
        own = None if fresh else checkpoint.newest_sound(source, tag, files=[META_FILE]).checkpoint
        if not own:
            raise
        print(
            f"note: the {before} checkpoint that {own.describe()} began with is gone or damaged; this goes on without"
        )
        return own
    own = None if fresh else checkpoint.newest_sound(source, tag or parent.tag, files=[META_FILE]).checkpoint
    return own if own and parent.meta["saved_at"] < own.meta["parent"]["saved_at"] else parent


def begin(
    source: str,
    options: TrainOptions,
    runtime: Runtime,
    tokenizer: Tokenizer,
    *,
    parent: Checkpoint | None = None,
    config: GPTConfig | None = None,
    data: str | None = None,
) -> Training:
    """Resume the newest checkpoint of this model, or start it: from `parent`'s weights, or anew in shape `config`.

    A checkpoint that grew from another parent, or from other conversations (`data`), is not resumed but begun anew,
    which takes minutes or hours; pretraining, which takes days, is refused on other text. What a new start replaces
    is set aside. Raises UserError if the checkpoint has another shape, tokenizer or course than asked for, or if the
    options ask for FP8 and the device has none.
    """
    if options.fp8 and not runtime.has_fp8:
        raise UserError(
            "--fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), and here is "
            f"{runtime.describe()}: run it without"
        )
    tag = options.model_tag or (parent.tag if parent else f"d{config.n_layer}" if config else "")
    check_tag(tag)
    ancestry: dict[str, Any] | None = None
    if parent and parent.source == source:  # itself, as parent_of says
        ancestry = parent.meta["parent"]
    elif parent:
        ancestry = {key: parent.meta[key] for key in ("source", "tag", "step", "saved_at")}
    can_begin = parent is not None and parent.source != source

    existing = runtime.world.call_on_main(
        lambda: _own_checkpoint(source, tag, options.fresh, ancestry, data, can_begin)
    )
    if existing:
        return _resume(existing, options, runtime, tokenizer, config)
    if parent:
        if runtime.world.is_main and parent.step < parent.meta["num_iterations"]:
            print(f"note: {parent.describe()} is not finished ({parent.meta['num_iterations']} steps were planned)")
        model = _load_model(parent, runtime, tokenizer)
    else:
        assert config is not None
        torch.manual_seed(options.seed)
        with torch.device(runtime.device):
            model = GPT(config, runtime.compute_dtype)
        runtime.world.broadcast(model.parameters())  # another kind of machine may draw other numbers
    optimizer = MuonAdamW(model, optimizer_options(options), runtime.world)
    return Training(source, tag, options, runtime, tokenizer, model, optimizer, ancestry, data)


def check_tag(tag: str) -> None:
    """Raise UserError if `tag` cannot be the name of a folder beside those of other models."""
    if not re.fullmatch(r"\w[\w.+-]*", tag) or tag == ASIDE:
        taken = ", where models that were set aside are kept" if tag == ASIDE else ""
        raise UserError(
            f"--model-tag {tag!r} cannot be{taken}: take letters, digits, dots and dashes, such as --model-tag d20-new"
        )


def _own_checkpoint(
    source: str, tag: str, fresh: bool, ancestry: dict[str, Any] | None, data: str | None, can_begin: bool
) -> Checkpoint | None:
    """The checkpoint to resume, the model locked and all that stands in the way of a new start set aside.

    `can_begin`: whether it may start anew without being asked to.
    """
    holder = locks.hold(paths.run_lock(source, tag))
    if holder:
        raise UserError(
            f"{holder} is training the {source} model {tag}: wait for it, stop it with kill -INT and its number, "
            "or name another model with --model-tag"
        )
    folder = paths.checkpoints_dir(source) / tag
    remove_leftovers(folder)
    if not fresh:
        existing = _newest_sound(source, tag)
        if not existing and checkpoint.saved_steps(folder):
            raise UserError(
                f"no checkpoint in {folder} can be read: restore one from an archive, or start over with "
                f"{STAGES[source].script} --fresh"
            )
        if existing and (existing.meta["parent"], existing.meta["data"]) == (ancestry, data):
            return existing
        if existing and not can_begin:
            raise UserError(
                f"{existing.folder} learned from other text ({existing.meta['data']}) than there is now ({data}): "
                f"prepare that again, or start over with {STAGES[source].script} --fresh"
            )
    if checkpoint.saved_steps(folder):
        aside = folder.parent / ASIDE / time.strftime(f"{tag}.%Y%m%d-%H%M%S")
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(
            f"the {source} model {tag} that was here is kept as {aside}; to have it back, stop this run, move {folder} "
            f"away if it is there, and: mv {aside} {folder}"
        )
    return None


def _newest_sound(source: str, tag: str) -> Checkpoint | None:
    """The checkpoint to resume. Damaged ones are named and lose their name, so that none counts as one to keep."""
    sound = checkpoint.newest_sound(source, tag)
    for damaged, note in zip(sound.damaged, sound.notes, strict=True):
        kept = damaged.folder.with_name(f"{damaged.folder.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        damaged.folder.rename(kept)
        sentence = f"note: {note}, so the one before it is used; it is kept as {kept.name}"
        print(sentence)
        LogFile(kept.parent / LOG_FILE).say(sentence)
    return sound.checkpoint


def _resume(
    existing: Checkpoint, options: TrainOptions, runtime: Runtime, tokenizer: Tokenizer, config: GPTConfig | None
) -> Training:
    model = _load_model(existing, runtime, tokenizer)
    if config and model.config != config:
        asked, there = dataclasses.asdict(config), dataclasses.asdict(model.config)
        other = ", ".join(f"{name} {there[name]}, not {asked[name]}" for name in asked if asked[name] != there[name])
        raise UserError(
            f"{existing.folder} holds a model of another shape ({other}): go on with its options, start over with "
            f"{STAGES[existing.source].script} --fresh, or name a new model with --model-tag"
        )
    meta = existing.meta
    check_same_course(options, meta["options"])
    optimizer = MuonAdamW(model, optimizer_options(options), runtime.world)
    state: dict[str, Tensor] = {}
    runtime.world.call_on_main(lambda: state.update(existing.load_optimizer(torch.device("cpu"))))
    optimizer.load_state_dict(state)
    run = Training(
        existing.source, existing.tag, options, runtime, tokenizer, model, optimizer, meta["parent"], meta["data"]
    )
    run.step, run.seconds_before, run.results = existing.step, meta["seconds"], meta["results"]
    run.saved_at = meta["saved_at"]
    # Checkpoints made before there were digests do not have these either.
    run.best, run.skipped_steps, run.tracker_id, run.evaluated = (
        meta.get("best", {}),
        meta.get("skipped_steps", 0),
        meta.get("tracker_id"),
        meta.get("evaluated", existing.step),
    )
    return run


def _load_model(saved: Checkpoint, runtime: Runtime, tokenizer: Tokenizer) -> GPT:
    """Its model in every process. The main one alone reads the files: no other machine has to have them."""
    model = saved.untrained_model(runtime.device, runtime.compute_dtype, tokenizer)
    runtime.world.call_on_main(lambda: saved.load_weights(model))
    runtime.world.broadcast(model.parameters())
    return model


def optimizer_options(options: TrainOptions) -> OptimizerOptions:
    """The optimizer's part of a stage's options; what is None keeps the optimizer's default."""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay")
    return OptimizerOptions(**{name: v for name in names if (v := getattr(options, name)) is not None})
