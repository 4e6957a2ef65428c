"""The options that every training stage shares. Each stage's own dataclass adds its own."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar


@dataclass
class TrainOptions:
    """Options of a training stage. `None` where a stage inherits from the one before, or derives from depth."""

    run: str | None = None
    """name of the run at wandb or trackio"""
    tracker: Literal["auto", "wandb", "trackio", "none"] = "auto"
    """auto: wandb if a run is named or you are logged in; metrics.jsonl is always written"""
    model_tag: str | None = None
    """which model; by default d<depth>, or the newest of the stage before"""
    fresh: bool = False
    """start over instead of resuming; what was there is set aside, not deleted"""
    device_type: str = "auto"
    """auto, cuda, mps or cpu"""
    compile: bool | None = None
    """torch.compile; by default on CUDA only"""
    seed: int = 42

    device_batch_size: int | None = None
    """rows in one forward pass; lower it if memory runs out, the result stays the same"""
    total_batch_size: int | None = None
    """tokens in one optimizer step, over all processes and micro-batches"""
    num_iterations: int | None = None
    """optimizer steps"""

    matrix_lr: float | None = None
    """learning rate of Muon"""
    embedding_lr: float | None = None
    """learning rate of the token embedding"""
    unembedding_lr: float | None = None
    """learning rate of the head"""
    weight_decay: float | None = None
    """of the matrices"""
    grad_clip: float = 1.0
    """largest global norm of the gradient; 0: no clipping"""
    init_lr_frac: float = 1.0
    """all learning rates times this"""
    warmup_ratio: float = 0.0
    """share of the steps in which learning rates rise from 0"""
    warmdown_ratio: float = 0.2
    """share of the steps in which they fall"""
    final_lr_frac: float = 0.0
    """where they fall to"""

    eval_every: int = 250
    """steps between validations; 0: at the end only"""
    eval_tokens: int = 10_485_760
    """tokens of held-out text to validate on"""
    sample_every: int = 0
    """steps between samples from the model; 0: at the end only"""
    save_every: int = 1000
    """steps between checkpoints; 0: at the end only"""
    keep_last: int = 2
    """checkpoints to keep"""


Options = TypeVar("Options", bound=TrainOptions)

INHERITED = (
    "device_batch_size",
    "total_batch_size",
    "matrix_lr",
    "embedding_lr",
    "unembedding_lr",
    "weight_decay",
)


def inherit(options: Options, parent: Mapping[str, Any]) -> Options:
    """`options` with what was left open taken from the stage before."""
    return dataclasses.replace(
        options, **{name: parent[name] for name in INHERITED if getattr(options, name) is None and name in parent}
    )
