"""What memory, traffic and speed to expect of more machines: the tables of docs/scaling.md, from the code and a few
figures of hardware. Nothing here is measured; tests/test_scaling.py holds the bytes against those that processes sent.

python -m benchmarks.scaling
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from nanochat.dist import World
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train import memory
from nanochat.train.batch_size import SAFE_SHARE
from nanochat.train.optim import POLAR_EXPRESS, MuonAdamW, OptimizerOptions
from nanochat.train.sharding import share_out

VOCAB_SIZE, SEQUENCE_LEN = 65_536, 2_048
BATCH = {20: 524_288, 26: 1_048_576, 32: 1_048_576}
"""Depths, and what pretrain.sh takes as tokens in a step."""
OF_THE_LINK = 0.8
"""Share of a link's nominal speed that collectives reach."""
BACKWARD = 2 / 3
"""The backward pass's share of a micro-batch."""


@dataclass(frozen=True)
class Setting:
    """Some processes, each with a GPU, and what joins them."""

    name: str
    processes: int
    flops: float
    """FLOP/s that one GPU sustains in training: 40% of its dense bf16 peak"""
    link: float
    """bytes/s, nominal, at which a process sends while all do"""
    memory: float
    """bytes of one GPU"""
    shared: bool = False
    """whether they are the CPU's too"""


SPARK, H100 = 0.4 * 125e12, 0.4 * 989e12
SETTINGS = (
    Setting("1 Spark", 1, SPARK, 1.0, 119 * 2**30, shared=True),
    Setting("2 Sparks, 200 Gb/s", 2, SPARK, 25e9, 119 * 2**30, shared=True),
    Setting("8 × H100, NVLink", 8, H100, 450e9, 80e9),
    # A ring crosses from node to node once, and eight of them, one for each 400 Gb/s card, share the bytes.
    Setting("8 nodes of 8 × H100", 64, H100, 400e9, 80e9),
)


def bytes_sent(parameters: int, processes: int) -> tuple[float, float]:
    """What one process sends in a step, on average: for the sums of gradients, and for the new weights.

    Each of the 4 N bytes goes once from whoever does not own it, or once along the chain of those who have not yet
    got it: (P - 1) / P of them for each process. That is NCCL's way, chains of processes. gloo, which adds up in a
    ring before it collects the sum at its owner, sends 1 + 1 / P times as much for the sums.
    """
    each = 4 * parameters * (processes - 1) / processes
    return each, each


@cache
def shape(depth: int, vocab_size: int = VOCAB_SIZE) -> GPT:
    """The model, without memory for its weights."""
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(depth, vocab_size, SEQUENCE_LEN), torch.bfloat16)


def needs(depth: int, setting: Setting, rows: int) -> memory.Needs:
    """Memory of the first process, whose share is no smaller than another's; not compiled, so the most that it is."""
    optimizer = MuonAdamW(shape(depth), OptimizerOptions(), World(0, setting.processes))
    return memory.needs(shape(depth), optimizer, rows, shared=setting.shared)


def rows_that_fit(depth: int, setting: Setting) -> int:
    """In one forward pass: up to 32, or what there is of the batch for each process."""
    rows = min(32, BATCH[depth] // SEQUENCE_LEN // setting.processes)
    while needs(depth, setting, rows).total > SAFE_SHARE * setting.memory:
        rows //= 2
    return rows


def muon_flops(depth: int, processes: int) -> float:
    """Of the process that owns the most: 4 r²c + 2 r³ for each iteration on a matrix with r <= c."""
    work = [0.0] * processes
    for shard in share_out(shape(depth), processes):
        if shard.name.startswith("layers"):
            r, c = sorted(shard.weight.shape)
            work[shard.owner] += len(POLAR_EXPRESS) * (4 * r * r * c + 2 * r**3)
    return max(work)


def step_seconds(depth: int, setting: Setting, *, overlapped: bool) -> float:
    """Time of a step; the sums of gradients go on during its last backward pass, or wait for its end."""
    model = shape(depth)
    tokens = BATCH[depth] / setting.processes
    compute = model.flops_per_token() * tokens / setting.flops
    sent = bytes_sent(model.config.num_parameters, setting.processes)
    sums, weights = (count / (OF_THE_LINK * setting.link) for count in sent)
    if overlapped:
        micro_batches = tokens / SEQUENCE_LEN / rows_that_fit(depth, setting)
        sums = max(0.0, sums - BACKWARD * compute / micro_batches)
    return compute + muon_flops(depth, setting.processes) / setting.flops + sums + weights


def efficiency(depth: int, setting: Setting, *, overlapped: bool) -> float:
    """Speed over that of one process times their number."""
    alone = replace(setting, processes=1)
    seconds = step_seconds(depth, setting, overlapped=overlapped)
    return step_seconds(depth, alone, overlapped=False) / setting.processes / seconds


def memory_table() -> str:
    """Rows of a Markdown table, in GB (10^9)."""
    lines = [
        "| depth | setting | weights | gradients | optimizer | activations of rows | logits | checkpoint | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for depth in BATCH:
        for setting in SETTINGS:
            n = needs(depth, setting, rows_that_fit(depth, setting))
            parts = (n.weights, n.gradients, n.optimizer, n.activations, n.logits, n.checkpoint, n.total)
            weights, gradients, optimizer, activations, logits, checkpoint, total = (
                f"{part / 1e9:.1f}" for part in parts
            )
            lines.append(
                f"| {depth} | {setting.name} | {weights} | {gradients} | {optimizer} | {activations} of {n.rows} | "
                f"{logits} | {checkpoint} | {total} |"
            )
    return "\n".join(lines)


def speed_table() -> str:
    """Rows of a Markdown table."""
    lines = [
        "| depth | setting | sends in a step | step | efficiency | with sums hidden |",
        "|---|---|---|---|---|---|",
    ]
    for depth in BATCH:
        for setting in SETTINGS:
            sent = sum(bytes_sent(shape(depth).config.num_parameters, setting.processes))
            plain, hidden = (100 * efficiency(depth, setting, overlapped=overlapped) for overlapped in (False, True))
            seconds = step_seconds(depth, setting, overlapped=False)
            lines.append(
                f"| {depth} | {setting.name} | {sent / 1e9:.1f} GB | {seconds:.3g} s | {plain:.0f}% | {hidden:.0f}% |"
            )
    return "\n".join(lines)


def deepest(setting: Setting) -> int:
    """The last even depth whose weights, gradients and shared-out optimizer fit, with one row at a time."""
    depths = (depth for depth in range(20, 128, 2) if needs(depth, setting, 1).total > setting.memory)
    return next(depths) - 2


if __name__ == "__main__":
    print(memory_table(), speed_table(), sep="\n\n")
    for setting in SETTINGS:
        print(f"\ndeepest that fits on {setting.name}: {deepest(setting)}")
