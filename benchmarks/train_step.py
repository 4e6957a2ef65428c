"""How fast a training step is: against what the machine can multiply, and against transformers' class of this model.

python -m benchmarks.train_step --depth 4 --peer transformers
"""

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat import cli
from nanochat.data.batches import Batch, RowBatches
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import ShardedIds, TokenShards
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.loss import IGNORE
from nanochat.runtime import Runtime, fast_rows, measure_matmul_flops, peak_memory_bytes, software
from nanochat.train.gradients import StepGradients
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import check_range

COPY_BYTES = 1 << 28
WARM_UP_STEPS = 2
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "mkldnn::_linear_pointwise"}
ATTENTION = ("scaled_dot_product", "flash_attention", "BlockedAttention")
LOSS, OPTIMIZER, LOADER = "head and loss", "optimizer", "loader"


@dataclass
class BenchmarkOptions:
    """Time whole training steps (loader, forward, backward, optimizer) with random tokens."""

    depth: int = 4
    max_seq_len: int = 512
    vocab_size: int = 8192
    total_batch_size: int = 16_384
    """tokens in a step"""
    device_batch_size: int | None = None
    """rows in one forward pass; by default as pretraining takes them"""
    steps: int = 5
    """that are timed; the median counts"""
    peer: Literal["none", "transformers", "without-fp8"] = "none"
    """transformers: its NanoChatForCausalLM with AdamW; without-fp8: this one but for --fp8; a step of each in turn"""
    device: str = "auto"
    """auto, cuda or cpu"""
    compile: bool | None = None
    """torch.compile; by default where a long training does"""
    fp8: bool = False
    """the matrices inside the blocks multiply in FP8; peaks stay the compute dtype's; a CPU emulates it, slowly"""
    json: bool = False
    """print one JSON object instead of a text"""

    def __post_init__(self) -> None:
        for name in ("steps", "device_batch_size", "total_batch_size"):
            check_range(name, getattr(self, name), 1)


@dataclass
class Result:
    """All figures of one run; seconds unless another unit is named."""

    machine: str
    software: str
    fp8: bool
    parameters: int
    matmul_flops: float
    """FLOP/s of a large matmul in the compute dtype"""
    datasheet_flops: float | None
    copy_bytes_per_second: float
    """read and written, of a large copy"""
    step: float
    """median"""
    step_fastest: float
    step_slowest: float
    tokens_per_second: float
    mfu_of_measured_peak: float
    mfu_of_datasheet: float | None
    first_step: float
    """from the start of the process to the end of the first step"""
    peak_memory_bytes: int
    breakdown: dict[str, float]
    """share of one profiled step"""
    peer: str = "none"
    peer_tokens_per_second: float | None = None
    ratio_to_peer: float | None = None
    """median of the ratios of neighbouring steps"""


Step = Callable[[], object]


def main(options: BenchmarkOptions) -> None:
    runtime = Runtime.start(options.device)
    result = measure(options, runtime)
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        print(describe(result))


def measure(options: BenchmarkOptions, runtime: Runtime) -> Result:
    """Run it all."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(options.depth, options.vocab_size, options.max_seq_len)
    with torch.device(runtime.device):
        model = GPT(config, runtime.compute_dtype)
    ours = our_step(options, runtime, model)
    ours()
    runtime.synchronize()
    first_step = seconds_since_start()
    steps = [ours]
    memory = peak_memory_bytes(runtime.device)
    if options.peer == "transformers":
        steps.append(transformers_step(options, runtime, config))
    elif options.peer == "without-fp8":
        with torch.device(runtime.device):
            plain = GPT(config, runtime.compute_dtype)
        steps.append(our_step(replace(options, fp8=False), runtime, plain))
    for _ in range(WARM_UP_STEPS):
        for step in steps:
            step()
    times: list[list[float]] = []
    matmul = [measure_matmul_flops(runtime.device, runtime.compute_dtype)]
    for _ in range(options.steps):
        times.append([timed(step, runtime) for step in steps])
        matmul.append(measure_matmul_flops(runtime.device, runtime.compute_dtype))
    median = statistics.median(own for own, *_ in times)
    tokens_per_second = options.total_batch_size / median
    flops = model.flops_per_token() * tokens_per_second
    peak, origin = runtime.peak_flops()
    datasheet = peak if "datasheet" in origin else None
    result = Result(
        machine=runtime.describe(),
        software=software(),
        fp8=options.fp8,
        parameters=config.num_parameters,
        matmul_flops=max(matmul),
        datasheet_flops=datasheet,
        copy_bytes_per_second=measure_copy(runtime),
        step=median,
        step_fastest=min(own for own, *_ in times),
        step_slowest=max(own for own, *_ in times),
        tokens_per_second=tokens_per_second,
        mfu_of_measured_peak=flops / max(matmul),
        mfu_of_datasheet=flops / datasheet if datasheet else None,
        first_step=first_step,
        peak_memory_bytes=memory,
        breakdown=breakdown(ours, runtime),
    )
    if options.peer != "none":
        result.peer = options.peer
        result.peer_tokens_per_second = options.total_batch_size / statistics.median(peer for _, peer in times)
        result.ratio_to_peer = statistics.median(peer / own for own, peer in times)
    return result


def our_step(options: BenchmarkOptions, runtime: Runtime, model: GPT) -> Step:
    """A step as nanochat.train.loop takes it."""
    if options.fp8:
        model.train_in_fp8()
    compile_it = runtime.can_compile() if options.compile is None else options.compile
    if compile_it:
        model.compile_training()
    optimizer = MuonAdamW(model, OptimizerOptions())
    gradients = StepGradients(model, optimizer, runtime, grad_clip=1.0)
    loader = random_batches(options, runtime)

    def step() -> None:
        with record_function(LOADER):
            batches = loader(optimizer.steps)
        gradients.compute(batches, sys.maxsize)
        with record_function(OPTIMIZER):
            optimizer.step(1.0)

    return step


def transformers_step(options: BenchmarkOptions, runtime: Runtime, config: GPTConfig) -> Step:
    """The same step with transformers' class and torch's AdamW, its weights fp32 and cast by autocast, as is usual."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    from nanochat.hub.convert_model import hf_shape

    with torch.device(runtime.device):
        model = NanoChatForCausalLM(NanoChatConfig(**hf_shape(config), use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = random_batches(options, runtime)
    half = runtime.compute_dtype != torch.float32
    steps = 0

    def step() -> None:
        nonlocal steps
        batches = loader(steps)
        steps += 1
        optimizer.zero_grad()
        for batch in batches:
            tokens, targets = batch.tokens.to(runtime.device), batch.targets.to(runtime.device)
            with torch.autocast(runtime.device.type, runtime.compute_dtype, enabled=half):
                logits = model(tokens).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
                )
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def random_batches(options: BenchmarkOptions, runtime: Runtime) -> Callable[[int], list[Batch]]:
    """The product's loader over random tokens: the micro-batches of a step."""
    count = options.total_batch_size * 8 + 1
    ids = np.random.default_rng(0).integers(0, options.vocab_size, count, dtype=np.uint16)
    rows = options.device_batch_size or fast_rows(options.max_seq_len, runtime.device, runtime.compute_dtype)
    batches = RowBatches(
        StreamRows(TokenShards(ShardedIds([ids]), 1, 0), options.max_seq_len, bos_id=0),
        rows_per_step=options.total_batch_size // options.max_seq_len,
        device_batch_size=rows, world=runtime.world, seed=0,
    )  # fmt: skip
    return lambda step: batches.step_data(step).batches


def timed(step: Step, runtime: Runtime) -> float:
    """Seconds of one step."""
    begun = time.perf_counter()
    step()
    runtime.synchronize()
    return time.perf_counter() - begun


def seconds_since_start() -> float:
    """How long this process has been running, importing included. Linux only."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def measure_copy(runtime: Runtime) -> float:
    """Bytes a second, read and written, of a copy too large for the caches; the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(timed(lambda: target.copy_(source), runtime) for _ in range(5))


def breakdown(step: Step, runtime: Runtime) -> dict[str, float]:
    """Share of one step's time by what it went into."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if runtime.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        step()
        runtime.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.events() or ():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time is in the operation's that started it
        own = event.self_device_time_total if runtime.device.type == "cuda" else event.self_cpu_time_total
        seconds[_category(event)] += own
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


def _category(event: FunctionEvent) -> str:
    names = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    if any("LinearCrossEntropy" in name for name in names):
        return LOSS
    for section in (OPTIMIZER, LOADER):
        if section in names:
            return section
    if any(part in name for part in ATTENTION for name in names):
        return "attention"
    if any(name in MATMULS for name in names):
        return "matmul"
    return "norms, elementwise and the rest"


def describe(result: Result) -> str:
    """For a person."""
    share = "  ".join(f"{name} {part:.0%}" for name, part in result.breakdown.items() if part >= 0.005)
    lines = [
        f"{result.machine}; {result.software}",
        f"matmul {result.matmul_flops / 1e12:.3f} TFLOP/s, copy {result.copy_bytes_per_second / 1e9:.1f} GB/s",
        f"{result.parameters:,} parameters{', FP8' if result.fp8 else ''}: "
        f"{result.tokens_per_second:,.0f} tokens/s, a step {result.step:.3f} s "
        f"({result.step_fastest:.3f} to {result.step_slowest:.3f})",
        f"MFU {result.mfu_of_measured_peak:.1%} of the measured peak"
        + (f", {result.mfu_of_datasheet:.1%} of the datasheet's" if result.mfu_of_datasheet else ""),
        f"first step {result.first_step:.1f} s after the start, {result.peak_memory_bytes / 2**30:.2f} GiB at most",
        share,
    ]
    if result.ratio_to_peer:
        lines.append(
            f"{result.peer}: {result.peer_tokens_per_second:,.0f} tokens/s; this is {result.ratio_to_peer:.2f} times it"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
