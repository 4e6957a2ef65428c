"""What a model will take before it is begun: work, time, energy, memory and disk, stage by stage.

Work follows from the shape of the model; how fast a machine does it from figures that others measured and that are
named, until this machine has been measured itself.
"""

from dataclasses import dataclass

import torch

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import DATASHEET_TFLOPS
from nanochat.spark.compute import BANDWIDTH_GBPS
from nanochat.train.memory import checkpoint_bytes

SHARD_BYTES = 100e6
"""A shard of text as published, about (comments of nanochat's speedrun.sh)."""
TOKEN_BYTES = 2
CHARS_PER_SHARD, CHARS_PER_TOKEN = 250e6, 4.8
MID_TOKENS = 446e6
"""Conversations of one epoch: 851 steps of 524,288 tokens for 856K of them, as published for the same data sets under
a vocabulary of 32,768 (github.com/lakshmankolasani/lakshmankolasani.github.io, dgx-spark-nanochat-training)."""
TASK_BYTES = 600e6 + MID_TOKENS * (TOKEN_BYTES + 1)
"""Data sets of the later stages, and the token files of midtraining, which have a mask, about."""
SFT_ROWS, SFT_ROW_TOKENS = 23_000, 1000
"""A row's tokens, padding included: assumed."""
RL_STEPS, RL_REPLIES, RL_REPLY_TOKENS, RL_PROMPT_TOKENS = 200, 256, 256, 128
"""Replies count at their longest; prompts are GSM8K's, about."""
DECODE_SHARE = 0.5
"""Of the memory bandwidth, while replies are written: assumed."""
DECODE_BATCH = 128
LINK_EFFICIENCY = 0.97
SPARK_WATTS = 120
BYTES_PER_WEIGHT_READ = 8
"""A weight is read in fp32, and written and read again in bf16."""


@dataclass(frozen=True)
class Stage:
    """The work of one stage."""

    name: str
    tokens: float
    """trained on, or passed through the model"""
    flops: float
    decode_bytes: float = 0.0
    """read from memory to write replies"""


@dataclass(frozen=True)
class Machine:
    """How fast something trains, and what it draws."""

    name: str
    flops: float
    """FLOP/s reached in training"""
    bandwidth: float
    """bytes/s reached while replies are written"""
    watts: float | None
    """None where nobody knows"""
    sources: tuple[str, ...]
    """where the figures are from"""

    def hours(self, stage: Stage) -> float:
        """How long a stage takes, validation and checkpoints left out."""
        return (stage.flops / self.flops + stage.decode_bytes / self.bandwidth) / 3600

    def kwh(self, stage: Stage) -> float | None:
        """Energy of a stage."""
        return None if self.watts is None else self.hours(stage) * self.watts / 1000


def known(name: str, chip: str, count: float, mfu: float, watts: float, *sources: str) -> Machine:
    """A machine with `count` times a chip of the datasheets, of whose bf16 peak it reaches the share `mfu`."""
    bandwidth = BANDWIDTH_GBPS[chip] * 1e9 * count * DECODE_SHARE
    return Machine(name, DATASHEET_TFLOPS[chip] * 1e12 * count * mfu, bandwidth, watts, sources)


def machines(hosts: int, watts: float | None = None) -> list[Machine]:
    """One Spark, `hosts` of them, one H100, eight; `watts`: what a Spark draws, if the user knows better."""
    efficiency = LINK_EFFICIENCY if hosts > 1 else 1.0
    source = f"{SPARK_WATTS} W for the whole machine: github.com/jasonacox/dgx-spark"
    if watts is not None:
        source = f"{watts:g} W for the whole machine, as NANOCHAT_WATTS says"
    spark_watts = SPARK_WATTS if watts is None else watts
    return [
        known(
            "GB10", "GB10", 1, 0.40, spark_watts,
            "MFU 40%: d20's 11.2B tokens in 9 days, github.com/jasonacox/dgx-spark (38% at d12: "
            "lakshmankolasani.github.io, 8.95e17 operations in 316.5 minutes)",
            source,
        ),
        known(
            f"{hosts} x GB10", "GB10", hosts * efficiency, 0.40, spark_watts * hosts,
            f"{hosts} times one, times {efficiency:.0%} for the link: assumed; reported for two at d24",
        ),
        known(
            "H100", "H100", 1, 0.51, 1275,
            "MFU 51%: nanochat's run1000.sh, d32 on 8 x H100, 1.574 s for 524,288 tokens; one alone: assumed",
            "1,275 W: an eighth of a DGX H100's most, 10.2 kW (datasheet)",
        ),
        known("8 x H100", "H100", 8, 0.51, 10_200, "MFU as for H100; 10.2 kW: DGX H100's most (datasheet)"),
    ]  # fmt: skip


def flops_per_token(config: GPTConfig) -> float:
    """Operations to train on one token; of a model that exists as a shape only."""
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def stages(config: GPTConfig, base_tokens: float) -> list[Stage]:
    """The work of all stages. A pass without learning (RL's prompts and replies as they are written) is a third."""
    per_token = flops_per_token(config)
    read = RL_STEPS * RL_REPLIES * (RL_PROMPT_TOKENS + RL_REPLY_TOKENS)
    decode_steps = RL_STEPS * RL_REPLY_TOKENS * RL_REPLIES / DECODE_BATCH
    kv_bytes = 2 * 2 * config.n_layer * config.n_kv_head * config.head_dim  # keys and values in bf16, of one token
    per_decode_step = BYTES_PER_WEIGHT_READ * config.num_parameters + DECODE_BATCH * kv_bytes * (
        RL_PROMPT_TOKENS + RL_REPLY_TOKENS / 2
    )
    sft_tokens = SFT_ROWS * SFT_ROW_TOKENS
    return [
        Stage("pretrain", base_tokens, base_tokens * per_token),
        Stage("midtrain", MID_TOKENS, MID_TOKENS * per_token),
        Stage("sft", sft_tokens, sft_tokens * per_token),
        Stage("rl", read, read * per_token * 4 / 3, decode_steps * per_decode_step),
    ]


@dataclass(frozen=True)
class Disk:
    """Room that a model takes, in bytes."""

    num_shards: int
    text: float
    tokens: float
    tasks: float
    checkpoint: float
    checkpoints: float
    """of all stages, two kept of each and a third while it is written"""

    @property
    def download(self) -> float:
        """What comes over the network."""
        return self.text + self.tasks

    @property
    def total(self) -> float:
        """All of it."""
        return self.text + self.tokens + self.tasks + self.checkpoints


def disk(config: GPTConfig, num_shards: int, keep_last: int) -> Disk:
    """Room for text, tokens and the checkpoints of the four stages."""
    checkpoint = checkpoint_bytes(config)
    return Disk(
        num_shards=num_shards,
        text=num_shards * SHARD_BYTES,
        tokens=num_shards * CHARS_PER_SHARD / CHARS_PER_TOKEN * TOKEN_BYTES,
        tasks=TASK_BYTES,
        checkpoint=checkpoint,
        checkpoints=(4 * keep_last + 1) * checkpoint,
    )
