"""Run and time kernels on the GPU, and compare their speed with the datasheet."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from nanochat import host
from nanochat.runtime import cpu_name, datasheet, measure_matmul_flops, native_dtype
from nanochat.spark import system
from nanochat.spark.system import Check, run_checks

MIN_SHARE = 0.5
"""Share of the datasheet's figure below which something slows the GPU down. Large matmuls usually reach 0.6 to 0.9."""
REINSTALL = "rm -rf .venv && ./setup.sh"
NO_KERNELS = ("no kernel image", "ARCH_MISMATCH")  # errors of CUDA and cuBLAS if torch has no kernels for the chip


def hardware_checks(gpus: list[host.GPU]) -> list[Check]:
    """Run the checks that describe the hardware without identifying its owner."""
    checks: dict[str, Callable[[], Check | None]] = {"GPU": lambda: system.driver(gpus)}
    checks |= {"torch": build} if gpus else {"CPU": cpu}
    if torch.cuda.is_available():
        kernels = {"matmul bf16": matmul, "copy": copy, "attention": attention, "Triton": triton_kernel}
        for name, check in {**kernels, "compile": compiled}.items():
            checks[name] = partial(explain_errors, name, check)
        checks["clocks"] = lambda: system.clocks(host.gpus())
    return run_checks({**checks, "memory": lambda: system.memory(gpus)})


def explain_errors(name: str, check: Callable[[], Check]) -> Check:
    """Run a check; convert an out-of-memory error or missing kernels to a finding."""
    try:
        return check()
    except torch.OutOfMemoryError:
        return Check(name, "warning", "out of memory: other programs are using the GPU", "nvidia-smi    # lists them")
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_KERNELS):
            raise
        text = f"torch has no kernels for this chip, only for {' '.join(torch.cuda.get_arch_list())}"
        return Check(name, "failed", text, REINSTALL)


def build() -> Check:
    """Versions of torch and its CUDA, and access to the GPU."""
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.version.cuda is None:
        return Check("torch", "failed", f"{text}: a CPU build on a machine with a GPU", REINSTALL)
    if not torch.cuda.is_available():
        return Check("torch", "failed", f"{text}: no access to the GPU", "nvidia-smi    # does the driver answer?")
    text += f", kernels for {' '.join(torch.cuda.get_arch_list())}"
    if torch.cuda.get_device_capability() == (12, 1) and "sm_121" not in text:
        text += " (sm_121 runs those for sm_120)"
    return Check("torch", "ok", text)


def cpu() -> Check:
    dtype = native_dtype(torch.device("cpu"))
    flops = measure_matmul_flops(torch.device("cpu"), dtype)
    kind = str(dtype).removeprefix("torch.")
    return Check("CPU", "ok", f"{cpu_name()}, {torch.get_num_threads()} threads, {flops / 1e12:.2f} TFLOP/s in {kind}")


def matmul() -> Check:
    tflops = measure_matmul_flops(torch.device("cuda"), torch.bfloat16) / 1e12
    sheet = datasheet(torch.cuda.get_device_name())
    return compare("matmul bf16", tflops, "TFLOP/s", sheet and sheet.tflops)


def copy() -> Check:
    """Memory bandwidth of a copy, which reads and writes each byte."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    gbps = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e9
    sheet = datasheet(torch.cuda.get_device_name())
    return compare("copy", gbps, "GB/s", sheet and sheet.gbps)


def compare(name: str, measured: float, unit: str, expected: int | None) -> Check:
    if expected is None:
        return Check(name, "ok", f"{measured:,.0f} {unit}; no datasheet figure for this chip")
    text = f"{measured:,.0f} {unit}, {measured / expected:.0%} of the datasheet's {expected:,}"
    if measured >= MIN_SHARE * expected:
        return Check(name, "ok", text)
    fix = "nvidia-smi -q -d PERFORMANCE,POWER    # heat, weak power supply, or other programs on the GPU?"
    return Check(name, "warning", text, fix)


def timed(work: Callable[[], object]) -> float:
    """Mean seconds of GPU work, excluding the first runs."""
    return float(Timer("work()", globals={"work": work}).timeit(10).mean)


def attention() -> Check:
    """Speed of causal SDPA at the shape of depth 20, and its error against fp32."""
    query, key, value = torch.randn(3, 4, 10, 2048, 128, device="cuda", dtype=torch.bfloat16)
    attend = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    seconds = timed(attend)
    scores = query[:1, :1].float() @ key[:1, :1].float().mT / 128**0.5
    mask = torch.ones(2048, 2048, device="cuda", dtype=torch.bool).triu(1)
    reference = scores.masked_fill(mask, float("-inf")).softmax(-1) @ value[:1, :1].float()
    error = (attend()[:1, :1].float() - reference).abs().max().item()
    flops = 4 * query.numel() * 2048 / 2  # two matmuls, half of them masked
    text = f"{flops / seconds / 1e12:.0f} TFLOP/s forward, error {error:.3f}"
    return Check("attention", "ok", text) if error < 0.05 else Check("attention", "failed", text, REINSTALL)


def triton_kernel() -> Check:
    """A hand-written Triton kernel, which needs a C compiler, Python headers and a ptxas for this chip."""
    from nanochat.spark.triton_kernel import double  # machines without a GPU may have no Triton

    x = torch.randn(100_000, device="cuda")
    return check_result("Triton", lambda: double(x), 2 * x)


def compiled() -> Check:
    """torch.compile, which generates Triton kernels."""

    def example(x: Tensor) -> Tensor:
        return F.relu(x).square() * 0.5 + x.sin()

    x = torch.randn(1 << 20, device="cuda")
    return check_result("compile", lambda: torch.compile(example, dynamic=False)(x), example(x))


def check_result(name: str, work: Callable[[], Tensor], expected: Tensor) -> Check:
    """Compile and run `work`, and compare its result; on failure, show the most informative line of the error."""
    start = time.perf_counter()
    try:
        result = work()
        torch.cuda.synchronize()
    except Exception as error:  # compilers raise many types
        lines = str(error).splitlines() or [type(error).__name__]
        informative = [line.strip() for line in lines if any(word in line for word in ("ptxas", "Python.h", "sm_"))]
        fix = "./setup.sh    # installs the compiler and Python headers"
        return Check(name, "failed", [*informative, *lines][0][:200], fix)
    if not torch.allclose(result, expected, atol=1e-4):
        return Check(name, "failed", "compiles, but the result is wrong", REINSTALL)
    return Check(name, "ok", f"compiled and correct, in {time.perf_counter() - start:.1f}s")
