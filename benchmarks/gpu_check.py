"""Check and time everything that needs a GPU: one JSON and one Markdown file with the figures, in at most 8 minutes.

benchmarks/gpu_check.sh

Each check runs in a separate process, so that a failure or timeout does not affect the other results. What it has
measured until then is kept.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.random_model import random_model
from benchmarks.train_step import BenchmarkOptions, breakdown, time_steps, timed
from nanochat import cli
from nanochat.data.batches import RowBatches, StreamRows
from nanochat.data.token_files import ShardedIds, TokenShards
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.eval.multiple_choice import Option, Problem, score_options
from nanochat.inference.model_runner import ModelRunner, Span
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, datasheet, has_unified_memory, software
from nanochat.train.loop import train_step
from nanochat.train.memory import estimate_memory
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions
from nanochat.train.run import TrainingRun

TOTAL_SECONDS = 465  # then the remaining checks are skipped
CPU_CURVE = Path(__file__).parent / "results" / "gpu_check_cpu_curve.json"
"""Losses of `curve` on a CPU in fp32, written by `python -m benchmarks.gpu_check --only curve --device-type cpu`."""
CURVE_STEPS, CURVE_VOCAB = 60, 4096
NUM_PROBLEMS = 200

Figures = Iterator[dict[str, Any]]
"""Figures of a check, part by part."""


@dataclass
class CheckOptions:
    """Check and time everything that needs a GPU."""

    folder: str = "benchmarks/results"
    """folder for gpu_check.json, gpu_check.md and the errors in gpu_check.log"""
    only: str = ""
    """run one check in this process and print its figures as JSON, a line for each part"""
    patience: float = 1.0
    """factor on all time limits, for a slow machine"""
    device_type: str = "cuda"


def main(options: CheckOptions) -> None:
    if options.only:
        for figures in CHECKS[options.only][0](Runtime.start(options.device_type)):
            print(json.dumps(figures), flush=True)
        return
    if not torch.cuda.is_available():
        raise UserError(f"this torch ({torch.__version__}) finds no GPU: set PYTHON to a Python whose torch does")
    start, folder = time.monotonic(), Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "software": software(), "date": time.strftime("%Y-%m-%d")}
    with (folder / "gpu_check.log").open("w") as log:
        for name, (_, limit) in CHECKS.items():
            begin = time.monotonic()
            left = options.patience * TOTAL_SECONDS - (begin - start)
            if left > 10:
                log.write(f"== {name}\n")
                command = [sys.executable, "-m", "benchmarks.gpu_check", "--only", name]
                results[name] = run_alone(command, min(options.patience * limit, left), log)
            else:
                results[name] = {"error": "skipped: no time left"}
            results[name]["seconds"] = round(time.monotonic() - begin, 1)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            (folder / "gpu_check.json").write_text(json.dumps(results, indent=2) + "\n")  # so far
            (folder / "gpu_check.md").write_text(markdown(results))
    failed = [name for name in CHECKS if "error" in results[name]]
    print(f"{time.monotonic() - start:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'no errors'}")
    sys.exit(bool(failed))


def run_alone(command: Sequence[str], seconds: float, log: TextIO) -> dict[str, Any]:
    """Run a command that prints figures as JSON lines. Returns them, with its `error` if it failed or was stopped."""
    error = ""
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                error = f"took more than {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what it has started
        output.seek(0)
        errors.seek(0)
        lines, text = output.read().splitlines(), errors.read()
    log.write(text)
    log.flush()
    figures: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a library's output, or a line cut off
            figures |= json.loads(line)
    if process.returncode and not error:
        error = (text.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]
    return figures | ({"error": error} if error else {})


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def gpu_tests(runtime: Runtime) -> Figures:
    """The tests that need a GPU, each file in a separate process: an error of CUDA would fail all tests after it."""
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    num_failed = 0
    running = [subprocess.Popen([*pytest, str(path)], stdout=subprocess.PIPE, text=True) for path in files]
    for path, process in zip(files, running, strict=True):
        lines = process.communicate()[0].strip().splitlines()
        sys.stderr.write("\n".join([*lines, ""]))
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        num_failed += process.returncode != 0
        yield {str(path): [lines[-1] if lines else f"exit code {process.returncode}", *failed]}
    if num_failed:
        yield {"error": f"{num_failed} of {len(files)} files failed"}


def new_run(runtime: Runtime, depth: int, vocab: int, context: int, dtype: torch.dtype) -> TrainingRun:
    """A run with the same weights on every device."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab, context), dtype)
    for name, parameter in model.named_parameters():  # no zeros, so that every gradient counts
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            torch.nn.init.normal_(parameter, std=0.5 * parameter.size(1) ** -0.5)
    model.to(runtime.device)
    optimizer = MuonAdamW(model, OptimizerOptions())
    return TrainingRun("base", "check", TrainOptions(), runtime, "", model, optimizer)


def chain_batches(rows_per_step: int, context: int) -> RowBatches:
    """Rows of a seeded Markov chain in which each token has 8 successors: something to learn, the same everywhere."""
    random = np.random.default_rng(0)
    successors = random.integers(1, CURVE_VOCAB, (CURVE_VOCAB, 8))
    ids, choices = np.ones(200_000, np.uint16), random.integers(0, 8, 200_000)
    for i in range(1, len(ids)):
        ids[i] = successors[ids[i - 1], choices[i]]
    rows = StreamRows(TokenShards(ShardedIds([ids]), 1, 0), context, bos_id=0)
    return RowBatches(rows, rows_per_step=rows_per_step, device_batch_size=rows_per_step, world=World(), seed=0)


def one_step(runtime: Runtime) -> Figures:
    """Loss and gradients of one step, eager and compiled, in bfloat16 and fp32, against those of a CPU in fp32."""
    batches = chain_batches(8, 256).step_data(0).batches

    def outcome(device: Runtime, dtype: torch.dtype, compiled: bool) -> tuple[float, list[torch.Tensor]]:
        run = new_run(device, 4, CURVE_VOCAB, 256, dtype)
        run.options.grad_clip = 0.0
        if compiled:
            run.model.compile_training([batches[0].tokens.shape])
        loss = train_step(run, batches).loss
        return loss, [p.grad.float().cpu() for p in run.model.parameters() if p.grad is not None]

    expected, gradients = outcome(Runtime.start("cpu"), torch.float32, False)
    yield {"cpu_loss": expected}
    for name, dtype, compiled in (
        ("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("bf16_compiled", torch.bfloat16, True),
    ):  # fmt: skip
        loss, own = outcome(runtime, dtype, compiled)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(own, gradients, strict=True)]
        yield {name: {"loss": loss, "max_relative_gradient_error": max(errors)}}


def step_of(depth: int, fp8: bool) -> Callable[[Runtime], Figures]:
    """Time a compiled training step of 32 rows of 2,048 tokens, and compare its peak memory with the estimate."""

    def check(runtime: Runtime) -> Figures:
        options = BenchmarkOptions(
            depth, 2048, 65_536, total_batch_size=65_536, device_batch_size=32, steps=3, compile=True, fp8=fp8
        )
        with torch.device("meta"):
            model = GPT(GPTConfig.from_depth(depth, 65_536, 2048), runtime.compute_dtype)
            optimizer = MuonAdamW(model, OptimizerOptions())
        if fp8:
            model.train_in_fp8()
        estimate = estimate_memory(model, optimizer, 32, shared=has_unified_memory(runtime.device))
        figures, step = time_steps(options, runtime)
        kept = ("tokens_per_second", "step", "mfu_of_datasheet", "matmul_flops", "copy_bytes_per_second")
        yield {
            **{name: figures[name] for name in (*kept, "first_step", "peak_memory_bytes")},
            "estimated_memory_bytes": estimate.total - estimate.checkpoint,
        }
        yield {"breakdown": breakdown(step, runtime)}

    return check


def attention(runtime: Runtime) -> Figures:
    """FLOP/s of causal attention at depth 20, forward and backward, by backend."""
    shape, on = (32, 10, 2048, 128), {"device": runtime.device, "dtype": runtime.compute_dtype}
    query, key, value = (torch.randn(shape, **on, requires_grad=True) for _ in range(3))  # type: ignore[call-overload]
    flops = 3.5 * 2 * 32 * 10 * 2048**2 * 128  # half of 2 matmuls forward and 5 backward

    def step() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                outcome: float | str = flops / min(timed(step, runtime) for _ in range(5))
        except RuntimeError as error:  # not supported on this GPU
            outcome = str(error)[:100]
        yield {backend.name: outcome}


@torch.inference_mode()
def decode(runtime: Runtime) -> Figures:
    """Tokens/s of decoding at depth 20 after 512 tokens, by streams, with and without CUDA graphs."""
    model = random_model(20, 65_536, 2048, runtime, gain=0.5)
    model.to(runtime.compute_dtype)
    weight_bytes = 2 * model.config.num_parameters
    yield {"weight_bytes": weight_bytes}
    for streams in (1, 16):
        for graphs in (True, False):
            runner = ModelRunner(model, streams, 65_536)
            runner.use_graphs = graphs
            tokens = torch.zeros(streams, dtype=torch.int64, device=runtime.device)
            for slot in range(streams):
                runner.hidden(torch.zeros(512, dtype=torch.int64, device=runtime.device), [Span(0, slot, (0,), 512)])

            def step(position: int, runner: ModelRunner = runner) -> None:
                nonlocal tokens
                span = Span(0, 0, (position,) * len(tokens), 1)
                logits = (
                    runner.decode(tokens, [span])
                    if runner.use_graphs
                    else runner.compute_logits(runner.hidden(tokens, [span]))
                )
                tokens = logits.argmax(dim=1)

            for position in range(512, 522):
                step(position)
            runtime.synchronize()
            start = time.perf_counter()
            for position in range(522, 586):
                step(position)
            runtime.synchronize()
            speed = 64 * streams / (time.perf_counter() - start)
            yield {
                f"{streams}_{'graphs' if graphs else 'launches'}": {
                    "tokens_per_second": speed,
                    "captured": runner.use_graphs,
                    "weights_read_gbps": weight_bytes * speed / streams / 1e9,
                }
            }


def curve(runtime: Runtime) -> Figures:
    """Losses of 60 steps at depth 8 against those of a CPU in fp32, which it writes if it runs on a CPU."""

    def losses(runtime: Runtime, dtype: torch.dtype, num_steps: int) -> list[float]:
        run, batches = new_run(runtime, 8, CURVE_VOCAB, 128, dtype), chain_batches(8, 128)
        return [round(train_step(run, batches.step_data(step).batches, 0.3).loss, 4) for step in range(num_steps)]

    if runtime.device.type == "cpu":
        CPU_CURVE.write_text(json.dumps(losses(runtime, torch.float32, CURVE_STEPS)) + "\n")
        return
    own = losses(runtime, runtime.compute_dtype, CURVE_STEPS)
    yield {"losses": own}
    start = losses(Runtime.start("cpu"), torch.float32, 3)
    yield {"first_of_cpu": start, "max_difference_in_3_steps": max_difference(own[:3], start)}
    expected = json.loads(CPU_CURVE.read_text())
    if max_difference(start, expected[:3]) > 0.01:
        yield {"error": f"{CPU_CURVE.name} is out of date: record it with --only curve --device-type cpu"}
    else:
        yield {"last_of_cpu": expected[-1], "max_difference": max_difference(own, expected)}


def max_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def core(runtime: Runtime) -> Figures:
    """Time 200 problems of the size of CORE's: four options after 600 tokens; check one against a CPU in fp32."""
    model, random = random_model(20, 65_536, 2048, runtime), np.random.default_rng(0)
    problems = []
    for _ in range(NUM_PROBLEMS):
        context = random.integers(1, 65_536, 600).tolist()
        answers = random.integers(1, 65_536, (4, 10)).tolist()
        problems.append(Problem([Option(context + answer, 600) for answer in answers], 0))
    start = time.perf_counter()
    scores = list(score_options(model, problems, 32 * 2048))
    yield {"problems_per_second": NUM_PROBLEMS / (time.perf_counter() - start)}
    model.compute_dtype = torch.float32
    expected = next(score_options(model.cpu(), problems[:1], 2048))
    errors = [abs(a.mean_loss - b.mean_loss) for a, b in zip(scores[0], expected, strict=True)]
    yield {"max_loss_error": max(errors)}


CHECKS: dict[str, tuple[Callable[[Runtime], Figures], float]] = {
    "tests": (gpu_tests, 120),
    "one_step": (one_step, 90),
    "curve": (curve, 60),
    "decode": (decode, 60),
    "attention": (attention, 30),
    "d12": (step_of(12, False), 90),
    "d20": (step_of(20, False), 120),
    "d20_fp8": (step_of(20, True), 150),
    "d12_fp8": (step_of(12, True), 120),
    "core": (core, 60),
}
"""Function and maximum seconds of each check, the most informative first."""


def markdown(results: dict[str, Any]) -> str:
    """The figures as a table per check."""
    origin = f"`benchmarks/gpu_check.sh`, {results['date']}. {results['software']}."
    lines = [f"# GPU check: {results['machine']}", "", origin]
    if sheet := datasheet(results["machine"]):
        lines.append(f"Datasheet: {sheet.tflops} TFLOP/s dense in bfloat16, {sheet.gbps} GB/s.")
    for name in CHECKS:
        if name in results:
            lines += ["", f"## {name}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {format_value(value)} |" for key, value in results[name].items()]
    return "\n".join(lines) + "\n"


def format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(format_value, value)) or "none"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    cli.run(main, CheckOptions)
