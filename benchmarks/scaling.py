"""Estimates of memory, traffic and speed on more machines: the tables of docs/scaling.md.

Computed from the code and from nominal hardware figures, not measured.

python -m benchmarks.scaling
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from nanochat.dist import World
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.spark.disk import VOCAB_SIZE
from nanochat.spark.plan import SPARK_MFU
from nanochat.train import memory
from nanochat.train.memory import SAFE_SHARE, SAFE_UNIFIED_SHARE
from nanochat.train.optim import POLAR_EXPRESS, MuonAdamW, OptimizerOptions
from nanochat.train.options import PretrainOptions
from nanochat.train.sharding import partition

SEQUENCE_LEN = PretrainOptions.max_seq_len
BATCH = {20: 262_144, 26: 524_288, 32: 524_288}
"""Tokens per step of pretrain.sh, by depth."""
LINK_UTILIZATION = 0.8
"""Share of a link's nominal speed that collectives reach."""
BACKWARD_SHARE = 2 / 3
"""The backward pass's share of a micro-batch's time."""


@dataclass(frozen=True)
class Setting:
    """A number of processes, each with a GPU, and the network between them."""

    name: str
    processes: int
    flops: float
    """FLOP/s of one GPU in training: 48% of its dense bf16 peak"""
    link: float
    """nominal bytes/s that each process sends while all do"""
    memory: float
    """bytes per GPU"""
    shared: bool = False
    """true if the GPU uses the memory of the CPU"""


SPARK, H100 = SPARK_MFU * 125e12, SPARK_MFU * 989e12
SETTINGS = (
    Setting("1 Spark", 1, SPARK, 1.0, 119 * 2**30, shared=True),
    Setting("2 Sparks, 200 Gb/s", 2, SPARK, 25e9, 119 * 2**30, shared=True),
    Setting("8 × H100, NVLink", 8, H100, 450e9, 80e9),
    # Eight rings, one per 400 Gb/s card, share the bytes; each crosses between two nodes once.
    Setting("8 nodes of 8 × H100", 64, H100, 400e9, 80e9),
)


def bytes_sent(parameters: int, processes: int) -> float:
    """Average bytes that one process sends per step to reduce gradients, and again to broadcast the new weights.

    NCCL passes each of the 4 N bytes once along a chain of P processes: (P - 1) / P of them per process. gloo reduces
    in a ring and then gathers the sum at its owner, and sends 1 + 1 / P times as much for gradients.
    """
    return 4 * parameters * (processes - 1) / processes


@cache
def shape(depth: int, vocab_size: int = VOCAB_SIZE) -> GPT:
    """The model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(depth, vocab_size, SEQUENCE_LEN), torch.bfloat16)


def needs(depth: int, setting: Setting, rows: int) -> memory.MemoryEstimate:
    """Memory of the first process, whose share is the largest; not compiled, which takes the most."""
    optimizer = MuonAdamW(shape(depth), OptimizerOptions(), World(0, setting.processes))
    return memory.estimate_memory(shape(depth), optimizer, rows, shared=setting.shared)


def rows_that_fit(depth: int, setting: Setting) -> int:
    """Rows per forward pass: at most 32, or the share of the batch that one process gets."""
    rows = min(32, BATCH[depth] // SEQUENCE_LEN // setting.processes)
    while needs(depth, setting, rows).total > setting.memory * (SAFE_UNIFIED_SHARE if setting.shared else SAFE_SHARE):
        rows //= 2
    return rows


def muon_flops(depth: int, processes: int) -> float:
    """FLOPs of the process that owns the most: 4 r²c + 2 r³ per iteration on a matrix of r <= c."""
    work = [0.0] * processes
    for shard in partition(shape(depth), processes):
        if shard.name.startswith("layers"):
            r, c = sorted(shard.weight.shape)
            work[shard.owner] += len(POLAR_EXPRESS) * (4 * r * r * c + 2 * r**3)
    return max(work)


def step_seconds(depth: int, setting: Setting, *, overlapped: bool) -> float:
    """Seconds per step, with gradients reduced during the last backward pass (`overlapped`) or after it."""
    model = shape(depth)
    tokens = BATCH[depth] / setting.processes
    compute = model.flops_per_token() * tokens / setting.flops
    sent = bytes_sent(model.config.num_parameters, setting.processes)
    reduce = broadcast = sent / (LINK_UTILIZATION * setting.link)
    if overlapped:
        micro_batches = tokens / SEQUENCE_LEN / rows_that_fit(depth, setting)
        reduce = max(0.0, reduce - BACKWARD_SHARE * compute / micro_batches)
    return compute + muon_flops(depth, setting.processes) / setting.flops + reduce + broadcast


def efficiency(depth: int, setting: Setting, *, overlapped: bool) -> float:
    """Speed divided by the number of processes times the speed of one."""
    alone = replace(setting, processes=1)
    seconds = step_seconds(depth, setting, overlapped=overlapped)
    return step_seconds(depth, alone, overlapped=False) / setting.processes / seconds


def memory_table() -> str:
    """Format the memory per process, in GB (10^9 bytes), as a Markdown table."""
    lines = [
        "| depth | setting | weights | gradients | optimizer | activations of rows | logits | checkpoint | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for depth in BATCH:
        for setting in SETTINGS:
            n = needs(depth, setting, rows_that_fit(depth, setting))
            parts = (n.weights, n.gradients, n.optimizer, n.activations, n.logits, n.checkpoint, n.total)
            cells = [str(depth), setting.name, *(f"{part / 1e9:.1f}" for part in parts)]
            cells[5] += f" of {n.rows}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table() -> str:
    """Format traffic, time per step and efficiency as a Markdown table."""
    lines = [
        "| depth | setting | sends in a step | step | efficiency | with sums hidden |",
        "|---|---|---|---|---|---|",
    ]
    for depth in BATCH:
        for setting in SETTINGS:
            sent = 2 * bytes_sent(shape(depth).config.num_parameters, setting.processes)
            plain, hidden = (100 * efficiency(depth, setting, overlapped=overlapped) for overlapped in (False, True))
            seconds = step_seconds(depth, setting, overlapped=False)
            lines.append(
                f"| {depth} | {setting.name} | {sent / 1e9:.1f} GB | {seconds:.3g} s | {plain:.0f}% | {hidden:.0f}% |"
            )
    return "\n".join(lines)


def deepest(setting: Setting) -> int:
    """Largest even depth that fits with one row per forward pass."""
    depths = (depth for depth in range(20, 128, 2) if needs(depth, setting, 1).total > setting.memory)
    return next(depths) - 2


if __name__ == "__main__":
    print(memory_table(), speed_table(), sep="\n\n")
    for setting in SETTINGS:
        print(f"\ndeepest that fits on {setting.name}: {deepest(setting)}")
