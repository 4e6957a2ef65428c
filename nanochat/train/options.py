"""Options shared by all training stages. Each stage adds its own in a subclass."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_type_hints

import tyro

from nanochat.data.amount import TOKENS_PER_PARAMETER
from nanochat.errors import UserError
from nanochat.train.optim import OptimizerOptions


class Range(NamedTuple):
    """Range of a numeric option, for `Annotated`."""

    low: float
    high: float | None = None


FREE = "free"  # the option may change on resume without altering the training trajectory
LOWER = "lower"  # the option may be lowered on resume, to rescue a run that has become unstable
INHERITED = "inherited"  # if not given, the option takes the value of the previous stage

FRACTION = Range(0, 1)


@dataclass
class TrainOptions:
    """Options of a training stage. None: inherited from the previous stage or derived from the depth."""

    more_help: ClassVar[str] = """The shell script of a stage also takes:
  NPROC=8 in front  number of processes on this machine, one per GPU
  --hosts a,b       train on these machines together, this one first
  --print           with --hosts: only print the command for each machine"""
    """shown by --help; these options are read by scripts/env.sh and scripts/launch.py"""

    run: Annotated[str | None, FREE] = None
    """name of the run in wandb or trackio"""
    tracker: Annotated[Literal["auto", "wandb", "trackio", "none"], FREE] = "auto"
    """auto: wandb if --run is given or you are logged in to it; metrics.jsonl is always written"""
    model_tag: Annotated[str | None, FREE] = None
    """name of the model; default: d<depth>, or the newest model of the previous stage"""
    fresh: Annotated[bool, FREE] = False
    """start over instead of resuming; existing checkpoints are set aside, not deleted"""
    device_type: Annotated[str, FREE] = "auto"
    """auto, cuda or cpu"""
    compile: Annotated[bool | None, FREE] = None
    """torch.compile; default: on for pretraining and midtraining, on CUDA or in long runs on a CPU"""
    fp8: Annotated[bool, FREE] = False
    """FP8 matrix multiplication inside the blocks in pretraining and midtraining, on a GPU and compiled"""
    seed: Annotated[int, Range(0)] = 42

    device_batch_size: Annotated[int | Literal["auto"] | None, Range(1), FREE, INHERITED] = None
    """rows per forward pass, or auto: as many as fit in memory; does not change the result"""
    num_iterations: Annotated[int | None, Range(1), FREE] = None
    """optimizer steps"""

    matrix_lr: Annotated[float | None, Range(0), LOWER, INHERITED] = None
    """learning rate of Muon"""
    embedding_lr: Annotated[float | None, Range(0), LOWER, INHERITED] = None
    """learning rate of the token embedding"""
    unembedding_lr: Annotated[float | None, Range(0), LOWER, INHERITED] = None
    """learning rate of the output head"""
    weight_decay: Annotated[float | None, Range(0), INHERITED] = None
    """weight decay of the matrices that Muon updates"""
    grad_clip: Annotated[float, Range(0)] = 1.0
    """maximum global norm of the gradient; 0: no clipping"""
    init_lr_frac: Annotated[float, Range(0)] = 1.0
    """factor on all learning rates"""
    warmup_ratio: Annotated[float, FRACTION] = 0.0
    """fraction of the steps over which the learning rates rise from 0"""
    warmdown_ratio: Annotated[float, FRACTION] = 0.2
    """fraction of the steps over which they fall"""
    final_lr_frac: Annotated[float, FRACTION] = 0.0
    """final factor on the learning rates"""

    save_every: Annotated[int, Range(0), FREE] = 250
    """steps between checkpoints; 0: at the end only"""
    keep_last: Annotated[int, Range(1), FREE] = 2
    """number of checkpoints to keep"""
    keep_every: Annotated[int, Range(0), FREE] = 0
    """also keep checkpoints whose step is a multiple of this; 0: none"""
    sample_every: Annotated[int | None, Range(0), FREE] = None
    """steps between samples of generated text; 0: at the end only; default: a tenth of the steps"""

    def __post_init__(self) -> None:
        """Raises UserError if a number is out of range."""
        for name, annotations in _annotations(type(self)):
            for annotation in annotations:
                if isinstance(annotation, Range):
                    check_range(name, getattr(self, name), *annotation)


@dataclass
class PretrainOptions(TrainOptions):
    """Train a base model on text. --depth decides the rest; every other option overrides what follows from it."""

    depth: int = 20
    """number of layers; the width is 64 times the depth"""
    max_seq_len: int = 2048
    """context length in tokens"""
    dataset: Annotated[tuple[str, ...], FREE] = ("fineweb-edu",)
    """text to train on, prepared by prepare.sh; several with weights, such as fineweb-edu:0.7 ./mybooks:0.3"""
    from_: Annotated[str | None, FREE, tyro.conf.arg(name="from")] = None
    """base model to continue with a new schedule, such as d20; its depth and context are kept"""
    total_batch_size: Annotated[int | None, Range(1), INHERITED] = None
    """tokens per optimizer step, over all processes and micro-batches; default: follows from depth"""
    num_epochs: Annotated[float | None, Range(0.01), FREE] = None
    """epochs over the text, unless --num-iterations is given; default: 1 with --from"""
    target_param_data_ratio: Annotated[float, Range(0.01), FREE] = TOKENS_PER_PARAMETER
    """tokens per parameter of matrices and head, unless --num-iterations or --num-epochs is given"""
    short_rows_ratio: Annotated[float, FRACTION] = 0.6
    """initial fraction of the steps, in which rows are a quarter of the context"""
    warmdown_ratio: Annotated[float, FRACTION] = 0.8
    eval_every: Annotated[int, Range(0), FREE] = 250
    """steps between validations; 0: at the end only"""
    eval_tokens: Annotated[int, Range(1), FREE] = 10_485_760
    """tokens of held-out text per validation"""


@dataclass
class ContinueOptions(PretrainOptions):
    """The defaults of pretraining with --from: a short rise to a lower learning rate, and whole rows."""

    num_epochs: Annotated[float | None, Range(0.01), FREE] = 1.0
    init_lr_frac: Annotated[float, Range(0)] = 0.5
    warmup_ratio: Annotated[float, FRACTION] = 0.1
    warmdown_ratio: Annotated[float, FRACTION] = 0.9
    short_rows_ratio: Annotated[float, FRACTION] = 0.0


Options = TypeVar("Options", bound=TrainOptions)


def _annotations(options: type) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and `Annotated` metadata of each option."""
    hints = get_type_hints(options, include_extras=True)
    for option in dataclasses.fields(options):
        yield option.name, getattr(hints[option.name], "__metadata__", ())


def _marked(options: TrainOptions, mark: str) -> set[str]:
    return {name for name, annotations in _annotations(type(options)) if mark in annotations}


def check_range(name: str, value: float | str | None, low: float, high: float | None = None) -> None:
    """Raise UserError if the number `value` of option `name` is below `low` or above `high`."""
    if value is None or isinstance(value, str) or (low <= value and (high is None or value <= high)):
        return
    wanted = f"at least {low}" if high is None else f"between {low} and {high}"
    raise UserError(f"--{name.replace('_', '-')} must be {wanted}, got {value}")


def check_not_compiled(options: TrainOptions) -> None:
    """Raise UserError if --compile True or --fp8 is given in a stage whose batch shapes vary."""
    for option, value in (("--compile", options.compile), ("--fp8", options.fp8)):  # FP8 is slow if not compiled
        if value:
            raise UserError(f"{option} is not supported for SFT and RL, because batch shapes vary: leave it out")


def inherit(options: Options, parent: Mapping[str, Any]) -> Options:
    """Fill in options that were not given from those of the previous stage."""
    missing = (n for n in _marked(options, INHERITED) if getattr(options, n) is None and n in parent)
    return dataclasses.replace(options, **{name: parent[name] for name in missing})


def check_resumable(options: TrainOptions, saved: Mapping[str, Any]) -> None:
    """Raise UserError if resuming with `options` would alter the training trajectory of the run that saved `saved`."""
    free, lower = _marked(options, FREE), _marked(options, LOWER)
    for name, value in dataclasses.asdict(options).items():
        if name in free or name not in saved or saved[name] == value:
            continue
        before = getattr(OptimizerOptions, name) if saved[name] is None and name in lower else saved[name]
        if name in lower and value is not None and value < before:
            continue
        option = f"--{name.replace('_', '-')}"
        raise UserError(
            f"this run was started with {option} {saved[name]}, got {value}: resume with that value, start over with "
            "--fresh, or choose a new name with --model-tag"
        )
