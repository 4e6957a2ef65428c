"""What a run goes on from: its own newest checkpoint, the stage before, or nothing."""

import time
from typing import Any

import torch

from nanochat import checkpoint, paths
from nanochat.checkpoint import SCRIPTS, Checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, OptimizerOptions
from nanochat.options import TrainOptions, check_same_course
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Training


def parent_of(source: str, tag: str | None) -> Checkpoint:
    """The newest checkpoint of the stage before `source`. Raises UserError, naming the script to run, if none."""
    stages = list(paths.CHECKPOINT_FOLDERS)
    return checkpoint.find(stages[stages.index(source) - 1], tag)


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
    is set aside. Raises UserError if the checkpoint has another shape, tokenizer or course than asked for.
    """
    tag = options.model_tag or (parent.tag if parent else f"d{config.n_layer}" if config else "")
    ancestry: dict[str, Any] | None = None
    if parent:
        ancestry = {key: parent.meta[key] for key in ("source", "tag", "step", "saved_at")}
    existing = checkpoint.newest(source, tag)
    if existing and not options.fresh:
        if (existing.meta["parent"], existing.meta["data"]) == (ancestry, data):
            return _resume(existing, options, runtime, tokenizer, config)
        if not parent:
            raise UserError(
                f"{existing.folder} learned from other text ({existing.meta['data']}) than there is now ({data}): "
                f"prepare that again, or start over with {SCRIPTS[source]} --fresh"
            )
    runtime.barrier()  # all have looked before the main process moves anything
    if existing and runtime.is_main:
        aside = existing.folder.parent.parent / "aside" / time.strftime(f"{tag}.%Y%m%d-%H%M%S")
        aside.parent.mkdir(exist_ok=True)
        existing.folder.parent.rename(aside)
        print(f"the {source} model {tag} that was here is kept as {aside}")
    runtime.barrier()
    if parent:
        if runtime.is_main and parent.step < parent.meta["num_iterations"]:
            print(f"note: {parent.describe()} is not finished ({parent.meta['num_iterations']} steps were planned)")
        model = parent.load_model(runtime.device, runtime.compute_dtype, tokenizer)
    else:
        assert config is not None
        torch.manual_seed(options.seed)
        with torch.device(runtime.device):
            model = GPT(config, runtime.compute_dtype)
    optimizer = MuonAdamW(model, optimizer_options(options))
    return Training(source, tag, options, runtime, tokenizer, model, optimizer, ancestry, data)


def _resume(
    existing: Checkpoint, options: TrainOptions, runtime: Runtime, tokenizer: Tokenizer, config: GPTConfig | None
) -> Training:
    model = existing.load_model(runtime.device, runtime.compute_dtype, tokenizer)
    if config and model.config != config:
        raise UserError(
            f"{existing.folder} holds a model of another shape: go on with its options, start over with "
            f"{SCRIPTS[existing.source]} --fresh, or name a new model with --model-tag"
        )
    meta = existing.meta
    check_same_course(options, meta["options"])
    optimizer = MuonAdamW(model, optimizer_options(options))
    optimizer.load_state_dict(existing.load_optimizer(runtime.device))
    run = Training(
        existing.source, existing.tag, options, runtime, tokenizer, model, optimizer, meta["parent"], meta["data"]
    )
    run.step, run.seconds_before, run.results = existing.step, meta["seconds"], meta["results"]
    return run


def optimizer_options(options: TrainOptions) -> OptimizerOptions:
    """The optimizer's part of a stage's options; what is None keeps the optimizer's default."""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay")
    return OptimizerOptions(**{name: v for name in names if (v := getattr(options, name)) is not None})
