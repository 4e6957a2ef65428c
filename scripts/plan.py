"""Estimate what training a model takes: data, disk, memory, hours and energy.

./nanochat.sh plan --depth 20
./nanochat.sh plan --depth 26 --hosts 2
./nanochat.sh plan --depth 4 --dataset ./mybooks
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat import cli, host, paths
from nanochat.data.amount import CHARS_PER_TOKEN, MAX_EPOCHS, fit, tokens_for_depth
from nanochat.data.sources import DATASETS, Source, parse
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import DATASHEETS, has_unified_memory
from nanochat.spark.disk import VOCAB_SIZE, default_config, disk_space
from nanochat.spark.plan import (
    SPARK_FLOPS,
    SPARK_MFU,
    Machine,
    Tariff,
    format_count,
    pretraining,
    stage_table,
    stages_from,
)
from nanochat.train.memory import estimate_memory
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import PretrainOptions, check_range
from nanochat.train.scaling import default_batch_size
from nanochat.units import format_bytes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SPARK_WATTS, LINK_EFFICIENCY = 120.0, 0.97
GPT2_DEPTH, GPT2_TOKENS = 22, 6.3e9
GPT2_SOURCE = (
    "GPT-2's CORE is 0.2565; nanochat's d22 had 0.263 (mean of three) after 6.3B tokens of ClimbMix: "
    "github.com/karpathy/nanochat/pull/733. FineWeb-Edu takes 1.4 times as long (its log). "
    "Its architecture has parts that this one lacks; we have not trained a model of this size."
)
H100_FLOPS = DATASHEETS["H100"].tflops * 1e12 * 0.51


@dataclass
class PlanOptions:
    """Estimate what training a model takes.

    NANOCHAT_WATTS=100 sets the power of one Spark, NANOCHAT_PRICE_PER_KWH=0.30 the price of electricity.
    """

    depth: int = 20
    """number of layers, as in pretrain.sh"""
    dataset: tuple[str, ...] = PretrainOptions.dataset
    """text, as in pretrain.sh; the size of your own is estimated from its files if it is not prepared"""
    hosts: int = 2
    """number of DGX Sparks that train together, for the second column"""

    def __post_init__(self) -> None:
        check_range("hosts", self.hosts, 1)


def main(options: PlanOptions) -> None:
    config = default_config(options.depth)
    tokens = tokens_for_depth(options.depth, VOCAB_SIZE)
    batch = default_batch_size(tokens, config.sequence_len)
    steps = max(1, round(tokens / batch))
    work = pretraining(config, steps * batch)
    share_of_gpt2 = work.flops / pretraining(default_config(GPT2_DEPTH), GPT2_TOKENS).flops
    sources = parse(options.dataset)
    own = {source: num_tokens(source) for source in sources if source.name not in DATASETS}
    disk = disk_space(options.depth, None if len(own) < len(sources) else sum(own.values()))
    print(
        f"depth {options.depth}: {format_count(config.num_parameters)} parameters, "
        f"{format_count(steps * batch)} tokens, {work.flops:.1e} operations\n"
        f"          {share_of_gpt2:.0%} of those that reached GPT-2's CORE score in nanochat\n"
        f"steps     {steps:,} of {batch:,} tokens\n"
        f"download  {format_bytes(disk.download)}: {disk.num_shards} shards of text, and the tasks\n"
        f"{text_lines(own, sources, options.depth)}"
        f"disk      {format_bytes(disk.total)}: text {format_bytes(disk.text)}, tokens {format_bytes(disk.tokens)}, "
        f"checkpoints {format_bytes(disk.checkpoints)}\n"
        f"          ({format_bytes(disk.checkpoint)} each)\n"
        f"{memory_lines(config)}\n"
    )
    tariff = Tariff.from_environment()
    columns = machines(options.hosts, tariff.watts)
    print(*stage_table(stages_from("base", config, steps * batch), columns, tariff.price_per_kwh), "", sep="\n")
    for machine in columns:
        for source in machine.sources:
            print(textwrap.fill(f"{machine.name}: {source}", 80, subsequent_indent="  ", break_on_hyphens=False))
    print(textwrap.fill(f"GPT-2: {GPT2_SOURCE}", 80, subsequent_indent="  ", break_on_hyphens=False))
    print(
        "Not included: validation, checkpoints, downloads. Midtraining's token count is\n"
        "the one published for a similar mixture; those of SFT and RL are assumptions.\n"
        "After 20 steps, a run prints an estimate from its own speed."
    )


def num_tokens(source: Source) -> float:
    """Training tokens of the user's text: counted if prepared, else estimated from the bytes. Raises UserError."""
    folder = paths.tokens_dir(source.folder)
    try:
        names = json.loads((folder / "train.shards.json").read_text())["shards"]
        return float(sum(json.loads((folder / f"{name}.json").read_text())["tokens"] for name in names))
    except (OSError, ValueError, KeyError):
        location = source.location
        if location is None:
            raise UserError(f"{source.name} is not prepared: run ./prepare.sh --dataset {source.name} first") from None
        files = [path for path in (location, *location.rglob("*")) if path.is_file()]
        return sum(path.stat().st_size for path in files) / CHARS_PER_TOKEN


def text_lines(own: dict[Source, float], sources: Sequence[Source], depth: int) -> str:
    """A line for each source of the user's own: how often a run repeats it, and the depth that fits."""
    lines = []
    weights = [source.weight or own.get(source, math.inf) for source in sources]  # without weights, ours are endless
    for source, tokens in own.items():
        if share := (source.weight or tokens) / sum(weights):
            note = fit(tokens / share, depth, VOCAB_SIZE) or f"at most {MAX_EPOCHS} epochs at depth {depth}"
            lines.append(f"text      {format_count(tokens)} tokens of {source.name}: {note}\n")
    return "".join(lines)


def machines(hosts: int, watts: float | None = None) -> list[Machine]:
    """One Spark, `hosts` of them, one H100 and eight. `watts`: power of one Spark, if the user measured it."""
    link = LINK_EFFICIENCY if hosts > 1 else 1.0
    mfu = (
        f"MFU {SPARK_MFU:.0%} of 125 TFLOP/s: a model of a compiled step (benchmarks/results/gpu-model.md), not "
        "measured; --fp8 takes 15% less time at depth 22 by the same model. nanochat in 2025 had 40% "
        "(github.com/jasonacox/dgx-spark) and 38% (lakshmankolasani.github.io)"
    )
    power = f"{SPARK_WATTS:g} W for the whole machine: github.com/jasonacox/dgx-spark"
    if watts is not None:
        power = f"{watts:g} W for the whole machine, from NANOCHAT_WATTS"
    watts = SPARK_WATTS if watts is None else watts
    h100_mfu = "MFU 51%: nanochat's run1000.sh, d32 on 8 x H100, 1.574 s per step of 524,288 tokens; assumed for one"
    scaling = f"{hosts} times one GB10, times {link:.0%} for the link (assumed; reported for two at d24)"
    return [
        Machine("GB10", SPARK_FLOPS, watts, (mfu, power)),
        Machine(f"{hosts} x GB10", SPARK_FLOPS * hosts * link, watts * hosts, (scaling,)),
        Machine("H100", H100_FLOPS, 1275, (h100_mfu, "1,275 W: an eighth of a DGX H100's maximum (datasheet)")),
        Machine("8 x H100", 8 * H100_FLOPS, 10_200, ("MFU as for one; 10.2 kW: DGX H100's maximum (datasheet)",)),
    ]


def memory_lines(config: GPTConfig) -> str:
    """Peak memory by --device-batch-size, and the memory of this machine."""
    shared = has_unified_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        optimizer = MuonAdamW(model, OptimizerOptions())
        totals = {rows: estimate_memory(model, optimizer, rows, shared=shared).total for rows in BATCH_SIZES}
    sizes = "  ".join(f"{rows}: {total / 1e9:.0f}" for rows, total in totals.items())
    here = ""
    if not shared:
        here = f"; this GPU has {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    elif memory := host.memory():
        here = f"; this machine has {memory.total / 1e9:.0f} GB"
    return f"memory    peak GB by --device-batch-size{here}\n          {sizes}"


if __name__ == "__main__":
    cli.run(main, PlanOptions)
