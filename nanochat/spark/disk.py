"""Estimate the disk space of a model: text, token files and the checkpoints of all stages."""

from dataclasses import dataclass

from nanochat.data.amount import CHARS_PER_TOKEN, SHARD_CHARS, shards_for_depth
from nanochat.data.sources import DATASETS
from nanochat.model.gpt import GPTConfig
from nanochat.spark.plan import MID_TOKENS
from nanochat.stages import STAGES
from nanochat.train.checkpoint import checkpoint_bytes
from nanochat.train.options import PretrainOptions

VOCAB_SIZE = 32_768  # default of prepare.sh
SHARD_BYTES = 100e6  # a published shard of text (comments of nanochat's speedrun.sh)
TOKEN_BYTES = 2
TASK_BYTES = 600e6 + MID_TOKENS * (TOKEN_BYTES + 1)
"""Datasets of the later stages, and midtraining's token files, which have a mask."""


@dataclass(frozen=True)
class Disk:
    """Disk space of one model, in bytes."""

    num_shards: int
    text: float
    tokens: float
    checkpoint: int
    checkpoints: int  # those of all stages, plus one being written
    download: float
    total: float


def default_config(depth: int) -> GPTConfig:
    """The model that prepare.sh and pretrain.sh make with only --depth given."""
    return GPTConfig.from_depth(depth, VOCAB_SIZE, PretrainOptions.max_seq_len)


def disk_space(depth: int, own_tokens: float | None = None) -> Disk:
    """Estimate the disk space of a model with only --depth given, or on `own_tokens` of the user's own text."""
    shards = min(shards_for_depth(depth, VOCAB_SIZE), DATASETS[PretrainOptions.dataset[0]].num_shards)
    text, tokens = shards * SHARD_BYTES, shards * SHARD_CHARS / CHARS_PER_TOKEN * TOKEN_BYTES
    if own_tokens is not None:
        shards, text, tokens = 0, 0.0, own_tokens * TOKEN_BYTES
    checkpoint = checkpoint_bytes(default_config(depth))
    checkpoints = (len(STAGES) * PretrainOptions.keep_last + 1) * checkpoint
    download = text + TASK_BYTES
    return Disk(shards, text, tokens, checkpoint, checkpoints, download, download + tokens + checkpoints)
