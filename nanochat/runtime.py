"""The device of a run: compute dtype, peak FLOP/s, memory."""

import functools
import gc
import os
import platform
import re
import resource
import shutil
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat import host
from nanochat.dist import World
from nanochat.errors import UserError


class Datasheet(NamedTuple):
    """The vendor's figures of a GPU."""

    tflops: int  # dense, in bf16
    gbps: int  # memory bandwidth in GB/s


DATASHEETS = {  # by the name that the driver reports
    "GB10": Datasheet(125, 273),
    "GB200": Datasheet(2500, 8000),
    "B200": Datasheet(2250, 8000),
    "H200": Datasheet(989, 4800),
    "H100 PCIe": Datasheet(756, 2000),
    "H100 NVL": Datasheet(835, 3900),
    "H100": Datasheet(989, 3350),
    "A100": Datasheet(312, 1935),
    "L40S": Datasheet(362, 864),
    "RTX 5090": Datasheet(210, 1792),
    "RTX 4090": Datasheet(165, 1008),
    "RTX 3090": Datasheet(71, 936),
}

MAX_UNUSED_BYTES = 4 << 30
COMPILE_THRESHOLD = 5e9
"""Tokens x layers x width of a run above which torch.compile pays off on a CPU. Compiling takes 20 s or more and saves
passes over memory: on two cores 5 ns per unit in fp32 and 7 to 9 in bfloat16."""


@dataclass(frozen=True)
class Runtime(AbstractContextManager["Runtime"]):
    """Device, compute dtype and processes of a run. A context manager: leaving it ends the process group."""

    device: torch.device
    compute_dtype: torch.dtype
    world: World
    started: float = 0.0  # time.monotonic() at the start

    @classmethod
    def start(cls, device_type: str = "auto") -> "Runtime":
        """Choose device and dtype and join the processes that torchrun started.

        Raises UserError if the requested device is missing, or if there are more processes than GPUs.
        """
        device = torch.device(resolve_device_type(device_type))
        if device.type == "cuda":
            local_rank, local_size = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
            if local_size > torch.cuda.device_count():
                raise UserError(
                    f"NPROC must be at most {torch.cuda.device_count()}, the number of GPUs, got {local_size}"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
            if has_unified_memory(device):  # each compiling process takes memory away from the GPU
                os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        return cls(device, native_dtype(device), World.join(device), time.monotonic())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the other processes may never reach the barrier that this implies.
        if kind is None:
            self.world.leave()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def release_unused_memory(self) -> None:
        """Release what torch's allocator caches beyond any step's need; shapes that vary let it grow."""
        unused = torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        if unused > MAX_UNUSED_BYTES:
            torch.cuda.empty_cache()

    @property
    def has_fp8(self) -> bool:
        """True if the device multiplies FP8: compute capability 8.9 or newer (Ada, Hopper, Blackwell)."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9)

    def can_compile(self) -> bool:
        """True if torch.compile finds Python's headers and a compiler (C for CUDA, C++ for a CPU)."""
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        compilers = ("cc", "gcc", "clang") if self.device.type == "cuda" else ("g++",)
        return headers.exists() and any(map(shutil.which, compilers))

    def unquoted_path(self) -> str | None:
        """A path with white space that torch.compile passes to the linker unquoted, which fails; None if there is none.

        On a GPU, it does not run the linker.
        """
        used = (str(Path(torch.__file__).parent), os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
        spaced = (path for path in used if re.search(r"\s", path))
        return next(spaced, None) if self.device.type == "cpu" else None

    def compile_pays_off(self, activations: float) -> bool:
        """True if torch.compile works and shortens a run of `activations` = tokens x layers x width per process."""
        return self.can_compile() and (self.device.type == "cuda" or activations > COMPILE_THRESHOLD)

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if self.device.type == "cpu" else ""
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        return f"{name}{threads}, {str(self.compute_dtype).removeprefix('torch.')}{processes}"

    def peak_flops(self) -> tuple[float, str]:
        """FLOP/s of one process's device in the compute dtype, and the source of the figure.

        From the datasheet of a known GPU, else measured with a matmul.
        """
        if self.device.type == "cuda" and (sheet := datasheet(torch.cuda.get_device_name(self.device))):
            return sheet.tflops * 1e12, "datasheet"
        return measure_matmul_flops(self.device, self.compute_dtype), "measured matmul"


def datasheet(name: str) -> Datasheet | None:
    """The figures of the chip in `name`, matched as whole words: an RTX A1000 is not an A100."""
    return next((sheet for chip, sheet in DATASHEETS.items() if re.search(rf"\b{chip}\b", name)), None)


def resolve_device_type(device_type: str) -> str:
    """`auto` becomes cuda if available, else cpu. Raises UserError if the requested device is missing."""
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device_type == "auto":
        return available[0]
    if device_type not in available:
        raise UserError(f"--device-type must be {' or '.join(available)} on this machine, got {device_type}")
    return device_type


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs since Ampere, CPUs with AMX, and AMD's since Zen 4; else float32.

    Against float32, bfloat16 matmuls are 2.2 times faster with the avx512_bf16 of an AMD EPYC (Zen 4), 2 times slower
    with that of an Intel Xeon, and 8 times slower emulated on AVX2.
    """
    if device.type == "cuda":
        is_faster = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = cpu_flags()
        is_faster = "amx_bf16" in flags or ("avx512_bf16" in flags and _cpuinfo("vendor_id") == "AuthenticAMD")
    return torch.bfloat16 if is_faster else torch.float32


def cpu_batch_tokens(dtype: torch.dtype) -> int:
    """Tokens per forward pass on a CPU; the activations of more would not fit in its cache.

    At depth 4 in fp32, evaluation with 16,384 is up to 40% slower, training with 4,096 up to 10%; in bfloat16 training
    with 2,048 is 10% slower.
    """
    return 4096 if dtype == torch.bfloat16 else 2048


def cpu_rows(sequence_len: int, dtype: torch.dtype) -> int:
    """Rows of `sequence_len` tokens per forward pass on a CPU, at least 1."""
    return max(1, cpu_batch_tokens(dtype) // sequence_len)


def fast_rows(sequence_len: int, device: torch.device, dtype: torch.dtype) -> int:
    """Default rows per forward pass in training."""
    return 32 if device.type == "cuda" else cpu_rows(sequence_len, dtype)


def software() -> str:
    """Versions of the system, Python, torch and CUDA."""
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}{cuda}"
    )


def commit() -> str:
    """The code's git commit, with `-dirty` if files differ from it; `unknown` outside a checkout."""
    folder = str(Path(__file__).parent)
    return host.output("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def cpu_flags() -> set[str]:
    """Instruction sets of an x86 CPU, such as avx512_bf16; empty on ARM."""
    return set(_cpuinfo("flags").split())


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache  # every matrix of an engine asks
def _cpuinfo(key: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of a square matmul, best of five; on a GPU large and repeated enough to hide launch overhead.

    On a CPU up to 2,048 wide: 1,024 does not keep AMX busy and reaches little more than half of its peak. A slow CPU is
    measured with narrower matrices: under emulation, 2,048 takes minutes.
    """
    sizes, products = ((8192,), 5) if device.type == "cuda" else ((256, 512, 1024, 2048), 1)
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        best = float("inf")
        for _ in range(5):
            start = clock()
            for _ in range(products):
                product = a @ b
            product[0, 0].item()
            best = min(best, clock() - start)
        if best > 0.2:  # the next one takes 8 times as long
            break
    return 2 * size**3 * products / best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: torch's counter on CUDA, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`. The processes of one machine share them.

    On a GPU that shares the CPU's memory, such as the GB10, the driver counts the page cache as used and NVML reports
    nothing, so the memory that the system reports as available counts.
    """
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if not has_unified_memory(device):
        return torch.cuda.mem_get_info(device)[0] + cached
    memory = host.memory()
    if memory is None:
        raise UserError(f"cannot read the free memory in {host.root() / 'proc/meminfo'}: unset NANOCHAT_ROOT")
    return memory.available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + cached


def has_unified_memory(device: torch.device) -> bool:
    """True if the device uses the CPU's memory. Taking too much of it raises no error: a process is killed."""
    return device.type != "cuda" or bool(torch.cuda.get_device_properties(device).is_integrated)


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` means that memory ran out. On a CPU torch has no exception type for it, and oneDNN, which
    multiplies bfloat16 there, only reports that it could not create a primitive."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # "could not create a primitive descriptor" is another error: an operation that oneDNN does not support.
    return bool(re.search("can't allocate memory|could not create a primitive(?! descriptor)", str(error)))


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting for it, which on a GPU needs pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def release_memory() -> None:
    """Free what is no longer referenced, such as a model before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
