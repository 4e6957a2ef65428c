"""Whether torch has kernels for this GPU, and how fast they are: run, timed, and compared with the datasheet."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.runtime import DATASHEET_TFLOPS, cpu_name, datasheet, measure_matmul_flops, native_dtype
from nanochat.spark.checks import Check

BANDWIDTH_GBPS = {
    "GB10": 273, "GB200": 8000, "B200": 8000, "H200": 4800, "H100 PCIe": 2000, "H100 NVL": 3900, "H100": 3350,
    "A100": 1935, "L40S": 864, "RTX 5090": 1792, "RTX 4090": 1008, "RTX 3090": 936,
}  # fmt: skip
"""Memory bandwidth in GB/s from the makers' datasheets, by what the driver calls the chip."""
ENOUGH = 0.5
"""Share of the datasheet's figure under which something holds the GPU back. Large matmuls commonly reach 0.6 to 0.9."""
REINSTALL = "rm -rf .venv && ./setup.sh"
NO_KERNELS = ("no kernel image", "ARCH_MISMATCH")
"""What CUDA and cuBLAS say where torch has nothing for the chip."""


def reaches_gpu() -> bool:
    """Whether there is anything to time."""
    return torch.cuda.is_available()


def tried(name: str, check: Callable[[], Check]) -> Check:
    """What a check finds on the GPU, or why it cannot run there."""
    try:
        return check()
    except torch.OutOfMemoryError:
        return Check(name, "warning", "no memory is free: other programs use the GPU", "nvidia-smi    # names them")
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_KERNELS):
            raise
        text = f"torch has no kernels for this chip, only for {' '.join(torch.cuda.get_arch_list())}"
        return Check(name, "failed", text, REINSTALL)


def build() -> Check:
    """Which torch this is, for which CUDA, and whether the GPU takes part."""
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.version.cuda is None:
        return Check("torch", "failed", f"{text}: a build for CPUs, beside a GPU", REINSTALL)
    if not reaches_gpu():
        return Check("torch", "failed", f"{text}: it cannot reach the GPU", "nvidia-smi    # does the driver answer?")
    return Check("torch", "ok", f"{text}, kernels for {' '.join(torch.cuda.get_arch_list())}")


def matmul() -> Check:
    """The speed of a bf16 matmul."""
    flops = measure_matmul_flops(torch.device("cuda"), torch.bfloat16)
    return against_datasheet("matmul bf16", flops / 1e12, "TFLOP/s", datasheet(DATASHEET_TFLOPS, _name()))


def bandwidth() -> Check:
    """The speed of a copy within memory; it reads and writes each byte."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source))
    return against_datasheet("copy", 2 * source.nbytes / seconds / 1e9, "GB/s", datasheet(BANDWIDTH_GBPS, _name()))


def attention() -> Check:
    """SDPA, causal, at the shape of depth 20; compared with a reference in fp32."""
    query, key, value = torch.randn(3, 4, 10, 2048, 128, device="cuda", dtype=torch.bfloat16)

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    seconds = timed(attend)
    scores = query[:1, :1].float() @ key[:1, :1].float().mT / 128**0.5
    mask = torch.ones(2048, 2048, device="cuda", dtype=torch.bool).triu(1)
    reference = scores.masked_fill(mask, float("-inf")).softmax(-1) @ value[:1, :1].float()
    error = (attend()[:1, :1].float() - reference).abs().max().item()
    flops = 4 * query.numel() * 2048 / 2  # two matmuls, of which causality leaves half
    text = f"{flops / seconds / 1e12:.0f} TFLOP/s forward, error {error:.3f}"
    return Check("attention", "ok" if error < 0.05 else "failed", text, "" if error < 0.05 else REINSTALL)


def triton_kernel() -> Check:
    """A kernel of Triton's, which needs a C compiler, Python's headers and a ptxas that knows the chip."""
    from nanochat.spark.triton_kernel import double  # where there is no GPU there may be no Triton

    x = torch.randn(100_000, device="cuda")
    return right("Triton", lambda: double(x), 2 * x)


def compiled() -> Check:
    """torch.compile, which writes Triton's kernels."""
    x = torch.randn(1 << 20, device="cuda")
    return right("compile", lambda: torch.compile(_example, dynamic=False)(x), _example(x))


def right(name: str, work: Callable[[], Tensor], expected: Tensor) -> Check:
    """Whether `work` can be compiled and its result is right, with the line that matters where it cannot."""
    begun = time.perf_counter()
    try:
        result = work()
        torch.cuda.synchronize()
    except Exception as error:  # compilers raise what they like
        said = str(error).splitlines() or [type(error).__name__]
        telling = [line.strip() for line in said if "ptxas" in line or "Python.h" in line or "sm_" in line] or said
        mend = "./setup.sh    # installs the compiler, Python's headers and CUDA 13's ptxas"
        return Check(name, "failed", telling[0][:200], mend)
    if not torch.allclose(result, expected, atol=1e-4):
        return Check(name, "failed", "it compiles, and its result is wrong", REINSTALL)
    return Check(name, "ok", f"compiled and right, in {time.perf_counter() - begun:.1f}s")


def cpu() -> Check:
    """The speed of the CPU, where there is no GPU."""
    dtype = native_dtype(torch.device("cpu"))
    flops = measure_matmul_flops(torch.device("cpu"), dtype)
    kind = str(dtype).removeprefix("torch.")
    return Check("CPU", "ok", f"{cpu_name()}, {torch.get_num_threads()} threads, {flops / 1e12:.2f} TFLOP/s in {kind}")


def against_datasheet(name: str, measured: float, unit: str, expected: int | None) -> Check:
    """A measured speed beside the datasheet's."""
    if expected is None:
        return Check(name, "ok", f"{measured:,.0f} {unit}; no datasheet is known for this chip")
    text = f"{measured:,.0f} {unit}, {measured / expected:.0%} of the datasheet's {expected:,}"
    if measured >= ENOUGH * expected:
        return Check(name, "ok", text)
    mend = "nvidia-smi -q -d PERFORMANCE,POWER    # heat, a weak power supply, or other programs on the GPU?"
    return Check(name, "warning", text, mend)


def timed(work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of GPU work, the best of some."""
    work()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def _example(x: Tensor) -> Tensor:
    return F.relu(x).square() * 0.5 + x.sin()


def _name() -> str:
    return torch.cuda.get_device_name()
