"""The options that every training stage shares. Each stage's own dataclass adds its own."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from nanochat.errors import UserError
from nanochat.train.optim import OptimizerOptions

AT_LEAST_ONE = ("device_batch_size", "total_batch_size", "num_iterations", "keep_last")
AT_LEAST_ZERO = ("save_every", "grad_clip", "init_lr_frac", "weight_decay", "seed", "sample_every", "keep_every")
SHARES = ("warmup_ratio", "warmdown_ratio", "final_lr_frac")

DeviceBatchSize = int | Literal["auto"]


@dataclass
class TrainOptions:
    """Options of a training stage. `None` where a stage inherits from the one before, or derives from depth."""

    more_help: ClassVar[str] = """Besides the options below, the shell script of a stage takes:
  NPROC=8 in front  that many processes on this machine, one for each GPU
  --hosts a,b       train on these machines together, this one first
  --print           with --hosts: start nothing, show what to type on each"""
    """what `--help` shows besides the options: they are read by scripts/env.sh and scripts/launch.py"""

    run: str | None = None
    """name of the run at wandb or trackio"""
    tracker: Literal["auto", "wandb", "trackio", "none"] = "auto"
    """auto: wandb if a run is named or you are logged in; metrics.jsonl is always written"""
    model_tag: str | None = None
    """which model; by default d<depth>, or the newest of the stage before"""
    fresh: bool = False
    """start over instead of resuming; what was there is set aside, not deleted"""
    device_type: str = "auto"
    """auto, cuda or cpu"""
    compile: bool | None = None
    """torch.compile; by default in the stages whose batches all have one shape: on CUDA, and in long runs on a CPU"""
    fp8: bool = False
    """the matrices inside the blocks multiply in 8-bit floating point while they train; needs a GPU that does"""
    seed: int = 42

    device_batch_size: DeviceBatchSize | None = None
    """rows in one forward pass, or auto: as many as fit into memory, or are fast on a CPU; the result is the same"""
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

    save_every: int = 250
    """steps between checkpoints; 0: at the end only"""
    keep_last: int = 2
    """checkpoints to keep"""
    keep_every: int = 0
    """keep besides, for good, those whose step is a multiple of this; 0: none"""
    sample_every: int | None = None
    """steps between samples of what the model writes; 0: at the end only; by default a tenth of the run"""

    def __post_init__(self) -> None:
        """Raises UserError for a number that cannot be, naming the nearest that can."""
        for names, low, high in ((AT_LEAST_ONE, 1, None), (AT_LEAST_ZERO, 0, None), (SHARES, 0, 1)):
            for name in names:
                check_range(name, getattr(self, name, None), low, high)


@dataclass
class PretrainOptions(TrainOptions):
    """Train a base model on text. --depth decides the rest; every other option overrides what follows from it."""

    depth: int = 20
    """layers; width is 64 times as much"""
    max_seq_len: int = 2048
    """context in tokens"""
    dataset: str = "fineweb-edu"
    """text prepared by prepare.sh"""
    total_batch_size: int | None = None
    """tokens in one optimizer step, over all processes and micro-batches; by default it follows from depth"""
    target_param_data_ratio: float = 20.0
    """tokens to train on for each parameter (Chinchilla: 20), unless --num-iterations is given"""
    short_rows_ratio: float = 0.6
    """share of the steps, the first ones, whose rows are a quarter of the context"""
    warmdown_ratio: float = 0.5
    eval_every: int = 250
    """steps between validations; 0: at the end only"""
    eval_tokens: int = 10_485_760
    """tokens of held-out text to validate on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("short_rows_ratio", self.short_rows_ratio, 0, 1)
        check_range("eval_every", self.eval_every, 0)
        check_range("eval_tokens", self.eval_tokens, 1)
        check_range("target_param_data_ratio", self.target_param_data_ratio, 0.01)


def check_not_compiled(options: TrainOptions) -> None:
    """Raise UserError if --compile True is asked of a stage whose batches have too many shapes to compile for each."""
    if options.compile:
        raise UserError("--compile True cannot be here, where batches have many shapes: leave it out")


def check_range(name: str, value: float | str | None, low: float, high: float | None = None) -> None:
    """Raise UserError if the option `name` is below `low` or above `high`, naming the nearest that can be.

    None and words are for the option's type to allow or not.
    """
    if value is None or isinstance(value, str):
        return
    nearest = max(value, low) if high is None else min(max(value, low), high)
    if nearest != value:
        raise UserError(f"--{name.replace('_', '-')} {value} cannot be: the nearest that can is {nearest}")


Options = TypeVar("Options", bound=TrainOptions)

INHERITED = (
    "device_batch_size",
    "total_batch_size",
    "matrix_lr",
    "embedding_lr",
    "unembedding_lr",
    "weight_decay",
)
FREE_ON_RESUME = {
    "run", "tracker", "model_tag", "fresh", "device_type", "compile", "fp8", "device_batch_size", "num_iterations",
    "num_epochs", "target_param_data_ratio", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_last",
    "keep_every",
}  # fmt: skip
"""Options that may change when a run is resumed; any other would bend its course. With fp8, numbers are rounded
otherwise, as on another device: a run that this harms, or that moves to a GPU without it, can go on without."""
LOWER_ON_RESUME = ("matrix_lr", "embedding_lr", "unembedding_lr")
"""Options that may be lowered then, on purpose: it is how a run that has become unstable is saved."""


OLDER_RUNS = {"short_rows_ratio": 0.0}
"""What a run did that was begun before there was the option."""


def inherit(options: Options, parent: Mapping[str, Any]) -> Options:
    """`options` with what was left open taken from the stage before."""
    is_open = (name for name in INHERITED if getattr(options, name, 0) is None and name in parent)
    return dataclasses.replace(options, **{name: parent[name] for name in is_open})


def check_same_course(options: TrainOptions, saved: Mapping[str, Any]) -> None:
    """Raise UserError if resuming with `options` would go another way than the run that saved `saved`."""
    saved = OLDER_RUNS | dict(saved)
    for name, value in dataclasses.asdict(options).items():
        if name in LOWER_ON_RESUME and value is not None:
            before = saved.get(name)
            if value < (getattr(OptimizerOptions, name) if before is None else before):
                continue
        if name not in FREE_ON_RESUME and name in saved and saved[name] != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"this run was started with {option} {saved[name]}, not {value}: go on with that, start over with "
                "--fresh, or name a new model with --model-tag"
            )
