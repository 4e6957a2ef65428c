"""What a model takes, before it is begun: data, disk, memory, hours and energy on several machines.

./nanochat.sh plan --depth 20
./nanochat.sh plan --depth 26 --hosts 2
"""

import textwrap
from dataclasses import dataclass

import torch

from nanochat import cli, host, paths
from nanochat.data.shards import DATASETS, shards_for_depth
from nanochat.dist import World
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime, has_unified_memory
from nanochat.spark import replan
from nanochat.spark.needs import training_bytes
from nanochat.spark.plan import Disk, disk, flops_per_token, machines, stages
from nanochat.spark.plan_table import count, gigabytes, stage_table
from nanochat.spark.tariff import Tariff
from nanochat.train.options import PretrainOptions, check_range
from nanochat.train.scaling import scale_options
from scripts.prepare import PrepareOptions

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class PlanOptions:
    """Tell what a model of some depth takes. NANOCHAT_PRICE_PER_KWH=0.30 adds the cost.

    NANOCHAT_WATTS=100 says what a Spark draws.
    """

    depth: int = 20
    """layers, as in pretrain.sh"""
    hosts: int = 2
    """DGX Sparks that work together, in the second column"""

    def __post_init__(self) -> None:
        check_range("hosts", self.hosts, 1)


def main(options: PlanOptions) -> None:
    prepare, pretrain = PrepareOptions(depth=options.depth), PretrainOptions(depth=options.depth)
    config = GPTConfig.from_depth(options.depth, prepare.vocab_size, pretrain.max_seq_len)
    gpu = Runtime(torch.device("cuda"), torch.bfloat16, World(0, 1))
    pretrain = scale_options(pretrain, config, gpu)
    assert pretrain.total_batch_size and pretrain.num_iterations
    tokens = pretrain.total_batch_size * pretrain.num_iterations
    print(
        f"depth {options.depth}: {count(config.num_parameters)} parameters, {count(tokens)} tokens, "
        f"{tokens * flops_per_token(config):.1e} operations\n"
        f"steps     {pretrain.num_iterations:,} of {pretrain.total_batch_size:,} tokens"
    )
    room = planned_disk(options.depth)
    print(
        f"download  {gigabytes(room.download)}: {room.num_shards} shards of text, and the tasks\n"
        f"disk      {gigabytes(room.total)}: text {gigabytes(room.text)}, tokens {gigabytes(room.tokens)}, "
        f"checkpoints {gigabytes(room.checkpoints)}\n"
        f"          ({gigabytes(room.checkpoint)} each)"
    )
    print(memory_line(config))
    print()
    tariff = Tariff.from_environment()
    compared = machines(options.hosts, tariff.watts)
    plan = replan.read(paths.checkpoints_dir("base") / f"d{options.depth}" / replan.FILE)
    if plan:
        compared = [plan.machine, *compared[:3]]
    print("\n".join(stage_table(stages(config, tokens), compared, tariff.price_per_kwh)))
    print()
    for machine in compared:
        for source in machine.sources:
            print(textwrap.fill(f"{machine.name}: {source}", 80, subsequent_indent="  ", break_on_hyphens=False))
    print(
        "Validation, checkpoints and downloads come on top. Midtraining: tokens as\n"
        "published for such a mixture; SFT and RL: assumed. After 20 steps a run tells\n"
        "its own figures."
    )


def planned_disk(depth: int) -> Disk:
    """Room for everything that a model of `depth` makes with the options left as they are."""
    prepare, pretrain = PrepareOptions(depth=depth), PretrainOptions(depth=depth)
    shards = min(shards_for_depth(depth, prepare.vocab_size), DATASETS[prepare.dataset].num_shards)
    config = GPTConfig.from_depth(depth, prepare.vocab_size, pretrain.max_seq_len)
    return disk(config, shards, pretrain.keep_last)


def memory_line(config: GPTConfig) -> str:
    """Memory at most, by --device-batch-size; what this machine has."""
    shared = has_unified_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = "  ".join(f"{rows}: {training_bytes(config, rows, shared=shared) / 1e9:.0f}" for rows in BATCH_SIZES)
    here = ""
    if not shared:
        here = f"; this GPU has {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    elif there := host.memory():
        here = f"; this machine has {there.total / 1e9:.0f} GB"
    return f"memory    GB at most, by --device-batch-size{here}\n          {sizes}"


if __name__ == "__main__":
    cli.run(main, PlanOptions)
