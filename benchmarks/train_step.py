"""Tokens/s of a training step, its MFU, and how its time divides among matmuls, attention, loss and optimizer.

python -m benchmarks.train_step --depth 4 --peer transformers
"""

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat import cli
from nanochat.data.batches import Batch, RowBatches, StreamRows
from nanochat.data.token_files import ShardedIds, TokenShards
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.loss import IGNORE
from nanochat.runtime import Runtime, fast_rows, measure_matmul_flops, peak_memory_bytes, software
from nanochat.train.loop import train_step
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions, check_range
from nanochat.train.run import TrainingRun
from nanochat.units import format_gib

COPY_BYTES = 1 << 28
WARM_UP_STEPS = 2
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "mkldnn::_linear_pointwise"}
ATTENTION = ("scaled_dot_product", "flash_attention", "BlockedAttention")
LOSS, LOADER = "head and loss", "loader"
OPTIMIZER_STEP = "Optimizer.step#MuonAdamW.step"
"""Name that torch.optim gives to a step in a profile."""

Step = Callable[[], object]


@dataclass
class BenchmarkOptions:
    """Time whole training steps (loader, forward, backward, optimizer) on random tokens."""

    depth: int = 4
    max_seq_len: int = 512
    vocab_size: int = 8192
    total_batch_size: int = 16_384
    """tokens per step"""
    device_batch_size: int | None = None
    """rows per forward pass; by default as in pretraining"""
    steps: int = 5
    """timed steps; figures are their median"""
    peer: Literal["none", "transformers", "without-fp8"] = "none"
    """also time, step by step in turn, ApertusForCausalLM with AdamW, or the same step without --fp8"""
    device_type: str = "auto"
    """auto, cuda or cpu"""
    compile: bool | None = None
    """torch.compile; by default as in a long pretraining run"""
    fp8: bool = False
    """FP8 matmuls inside the blocks (slow emulation on a CPU); MFU still refers to the peak of the compute dtype"""
    json: bool = False
    """print one JSON object instead of text"""

    def __post_init__(self) -> None:
        for name in ("steps", "device_batch_size", "total_batch_size"):
            check_range(name, getattr(self, name), 1)


def main(options: BenchmarkOptions) -> None:
    figures = measure(options, Runtime.start(options.device_type))
    print(json.dumps(figures) if options.json else describe(figures))


def measure(options: BenchmarkOptions, runtime: Runtime) -> dict[str, Any]:
    """Run the benchmark. Times are in seconds, speeds in units per second."""
    figures, step = time_steps(options, runtime)
    return figures | {"breakdown": breakdown(step, runtime)}


def time_steps(options: BenchmarkOptions, runtime: Runtime) -> tuple[dict[str, Any], Step]:
    """Return the figures without the breakdown, and the step."""
    torch.manual_seed(0)
    model = new_model(options, runtime)
    ours = our_step(options, runtime, model)
    ours()
    runtime.synchronize()
    first_step = process_seconds()
    memory = peak_memory_bytes(runtime.device)
    steps = [ours]
    if options.peer == "transformers":
        steps.append(transformers_step(options, runtime, model.config))
    elif options.peer == "without-fp8":
        steps.append(our_step(replace(options, fp8=False), runtime, new_model(options, runtime)))
    for _ in range(WARM_UP_STEPS):
        for step in steps:
            step()
    times: list[list[float]] = []
    matmul = measure_matmul_flops(runtime.device, runtime.compute_dtype)
    for _ in range(options.steps):
        times.append([timed(step, runtime) for step in steps])
        matmul = max(matmul, measure_matmul_flops(runtime.device, runtime.compute_dtype))
    own = [seconds for seconds, *_ in times]
    speed = options.total_batch_size / statistics.median(own)
    flops = model.flops_per_token() * speed
    peak, origin = runtime.peak_flops()
    datasheet = peak if "datasheet" in origin else None
    figures = {
        "machine": runtime.describe(),
        "software": software(),
        "fp8": options.fp8,
        "parameters": model.config.num_parameters,
        "matmul_flops": matmul,  # of a large matmul in the compute dtype
        "datasheet_flops": datasheet,
        "copy_bytes_per_second": measure_copy(runtime),  # read and written
        "step": statistics.median(own),
        "step_fastest": min(own),
        "step_slowest": max(own),
        "tokens_per_second": speed,
        "mfu_of_measured_peak": flops / matmul,
        "mfu_of_datasheet": flops / datasheet if datasheet else None,
        "first_step": first_step,  # from the start of the process to the end of its first step
        "peak_memory_bytes": memory,
        "peer": options.peer,
    }
    if options.peer != "none":
        figures["peer_tokens_per_second"] = options.total_batch_size / statistics.median(peer for _, peer in times)
        figures["ratio_to_peer"] = statistics.median(peer / own for own, peer in times)
    return figures, ours


def new_model(options: BenchmarkOptions, runtime: Runtime) -> GPT:
    with torch.device(runtime.device):
        config = GPTConfig.from_depth(options.depth, options.vocab_size, options.max_seq_len)
        return GPT(config, runtime.compute_dtype)


def our_step(options: BenchmarkOptions, runtime: Runtime, model: GPT) -> Step:
    """The step of nanochat.train.loop, without logging."""
    if options.fp8:
        model.train_in_fp8()
    if runtime.can_compile() if options.compile is None else options.compile:
        model.compile_training()
    optimizer = MuonAdamW(model, OptimizerOptions())
    run = TrainingRun("base", "benchmark", TrainOptions(), runtime, "", model, optimizer)
    loader = random_batches(options, runtime)

    def step() -> None:
        with record_function(LOADER):
            batches = loader()
        train_step(run, batches)

    return step


def transformers_step(options: BenchmarkOptions, runtime: Runtime, config: GPTConfig) -> Step:
    """The same step with transformers' model, fp32 weights under autocast, and torch's AdamW."""
    from nanochat.hub.convert_model import hf_model

    with torch.device(runtime.device):
        model: Any = hf_model(config)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = random_batches(options, runtime)
    mixed = runtime.compute_dtype != torch.float32

    def step() -> None:
        optimizer.zero_grad()
        batches = loader()
        for batch in batches:
            tokens, targets = batch.tokens.to(runtime.device), batch.targets.to(runtime.device)
            with torch.autocast(runtime.device.type, runtime.compute_dtype, enabled=mixed):
                logits = model(tokens).logits.float().flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def random_batches(options: BenchmarkOptions, runtime: Runtime) -> Callable[[], list[Batch]]:
    """Return a function that gives the micro-batches of the next step, from the real loader over random tokens."""
    count = options.total_batch_size * 8 + 1
    ids = np.random.default_rng(0).integers(0, options.vocab_size, count, dtype=np.uint16)
    batches = RowBatches(
        StreamRows(TokenShards(ShardedIds([ids]), 1, 0), options.max_seq_len, bos_id=0),
        rows_per_step=options.total_batch_size // options.max_seq_len,
        device_batch_size=options.device_batch_size
        or fast_rows(options.max_seq_len, runtime.device, runtime.compute_dtype),
        world=runtime.world,
        seed=0,
    )
    steps = iter(range(sys.maxsize))
    return lambda: batches.step_data(next(steps)).batches


def timed(step: Step, runtime: Runtime) -> float:
    """Seconds for one call."""
    start = time.perf_counter()
    step()
    runtime.synchronize()
    return time.perf_counter() - start


def process_seconds() -> float:
    """Seconds since this process was started, imports included. Linux only."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def measure_copy(runtime: Runtime) -> float:
    """Bytes/s read and written by a copy that does not fit into caches; the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(timed(lambda: target.copy_(source), runtime) for _ in range(5))


def breakdown(step: Step, runtime: Runtime) -> dict[str, float]:
    """Profile one step and return each category's share of its time; nothing where a container forbids profiling."""
    gpu = runtime.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        step()
        runtime.synchronize()
    seconds: Counter[str] = Counter()
    for event in profiled.events() or ():
        if event.device_type == DeviceType.CPU:  # includes the time of the kernels that it launched
            seconds[category(event)] += event.self_device_time_total if gpu else event.self_cpu_time_total
    return {name: value / seconds.total() for name, value in seconds.most_common() if value}


def category(event: FunctionEvent) -> str:
    names = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    if any("LinearCrossEntropy" in name for name in names):
        return LOSS
    if OPTIMIZER_STEP in names:
        return "optimizer"
    if LOADER in names:
        return LOADER
    if any(part in name for part in ATTENTION for name in names):
        return "attention"
    if any(name in MATMULS for name in names):
        return "matmul"
    return "norms, elementwise and the rest"


def describe(figures: dict[str, Any]) -> str:
    """Format the figures as text."""
    datasheet, peer = figures["mfu_of_datasheet"], figures["peer"]
    lines = [
        f"{figures['machine']}; {figures['software']}",
        f"matmul {figures['matmul_flops'] / 1e12:.3f} TFLOP/s, copy {figures['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        f"{figures['parameters']:,} parameters{', FP8' if figures['fp8'] else ''}: "
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['step']:.3f} s per step "
        f"({figures['step_fastest']:.3f} to {figures['step_slowest']:.3f})",
        f"MFU {figures['mfu_of_measured_peak']:.1%} of the measured peak"
        + (f", {datasheet:.1%} of the datasheet's" if datasheet else ""),
        f"first step {figures['first_step']:.1f} s after start, peak {format_gib(figures['peak_memory_bytes'])}",
        "  ".join(f"{name} {share:.0%}" for name, share in figures["breakdown"].items() if share >= 0.005),
    ]
    if peer != "none":
        lines.append(f"{peer}: {figures['peer_tokens_per_second']:,.0f} tokens/s; ratio {figures['ratio_to_peer']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
