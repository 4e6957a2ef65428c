"""The machine under the run: device, compute dtype, processes, memory, peak FLOP/s."""

import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.data.batches import Share
from nanochat.errors import UserError
from nanochat.train import agreement

Result = TypeVar("Result")

# Dense bf16 TFLOP/s from the makers' datasheets, by what the driver calls the chip.
DATASHEET_TFLOPS = {
    "GB10": 125,
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

COMPILING_PAYS = 5e9
"""Tokens x layers x width of a run from which on torch.compile is worth its start on a CPU. That takes 20 s or more;
what is saved are passes over memory, on two cores 5 ns for each of these numbers in fp32 and 7 to 9 in bfloat16."""


@dataclass(frozen=True)
class Runtime:
    """One process of a run. A context manager: leaving it ends the process group."""

    device: torch.device
    compute_dtype: torch.dtype
    share: Share
    """rank and number of processes"""
    started: float = 0.0
    """time.monotonic() when it began"""

    @classmethod
    def start(cls, device_type: str = "auto", reads: Collection[str] = agreement.CONVERSATIONS) -> "Runtime":
        """Join the processes that torchrun started, if it did, and choose device and dtype.

        `reads` is what several machines must have alike. Raises UserError if they have not, or if the device asked for
        is not there.
        """
        device_type = resolve_device_type(device_type)
        share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        device = torch.device(device_type)
        if device_type == "cuda":
            local_rank, local_world_size = (
                int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE")
            )
            if local_world_size > torch.cuda.device_count():
                raise UserError(
                    f"NPROC={local_world_size} is more than the GPUs here: the most is {torch.cuda.device_count()}"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if share.world_size > 1:
            # The main process tokenises, evaluates and saves while the others wait, on a big run for over ten minutes.
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(hours=2))
            if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:  # torchrun's number of machines
                try:
                    agreement.check(reads)
                except UserError:
                    dist.destroy_process_group()  # gloo's threads abort a process that ends before they do
                    raise
        return cls(device, native_dtype(device), share, time.monotonic())

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other processes may never come to the barrier that this implies.
        if dist.is_initialized() and error is None:
            dist.destroy_process_group()

    @property
    def is_local_main(self) -> bool:
        """Whether this process writes what every machine has to have, such as token files."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.share.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over processes, in place."""
        if self.share.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number summed over processes, in float64."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def from_main(self, make: Callable[[], Result]) -> Result:
        """What `make()` gives in the main process, in all of them; the UserError that it raises there, too."""
        if self.share.world_size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def send_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Make all processes' tensors those of the main process."""
        if self.share.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def smallest(self, number: int) -> int:
        """The least of all processes' numbers."""
        tensor = torch.tensor(number, device=self.device)
        if self.share.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def largest(self, number: int) -> int:
        """The greatest of all processes' numbers."""
        return -self.smallest(-number)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.share.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def has_fp8(self) -> bool:
        """Whether the device multiplies FP8: CUDA's from compute capability 8.9, which is Ada, Hopper and Blackwell."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9)

    def can_compile(self) -> bool:
        """Whether torch.compile finds Python's headers and a compiler, of C for CUDA, of C++ for a CPU."""
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        compilers = ("cc", "gcc", "clang") if self.device.type == "cuda" else ("g++",)
        return headers.exists() and any(map(shutil.which, compilers))

    def compiling_pays(self, activations: float) -> bool:
        """Whether a run is over sooner compiled, and can be; `activations`: tokens x layers x width of a process."""
        return self.can_compile() and (self.device.type == "cuda" or activations > COMPILING_PAYS)

    def describe(self) -> str:
        """Device, dtype and processes, in a few words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if self.device.type == "cpu" else ""
        processes = f", {self.share.world_size} processes" if self.share.world_size > 1 else ""
        return f"{name}{threads}, {str(self.compute_dtype).removeprefix('torch.')}{processes}"

    def peak_flops(self) -> tuple[float, str]:
        """FLOP/s of one process's device in the compute dtype, and where the figure is from.

        The datasheet's for a known GPU; else measured with a matmul.
        """
        if self.device.type == "cuda":
            tflops = datasheet(DATASHEET_TFLOPS, torch.cuda.get_device_name(self.device))
            if tflops:
                return tflops * 1e12, "datasheet"
        return measure_matmul_flops(self.device, self.compute_dtype), "measured matmul"


def datasheet(table: dict[str, int], name: str) -> int | None:
    """The figure of the chip that the driver calls `name`, as whole words: an RTX A1000 is no A100."""
    return next((figure for chip, figure in table.items() if re.search(rf"\b{chip}\b", name)), None)


def resolve_device_type(device_type: str) -> str:
    """`auto` becomes the best there is; another name is checked. Raises UserError if it is not there."""
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device_type == "auto":
        return available[0]
    if device_type not in available:
        raise UserError(f"--device-type {device_type} is not here: choose {' or '.join(available)}")
    return device_type


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32 (emulated bf16 was 8 times slower on an AVX2 CPU)."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    return torch.bfloat16 if native else torch.float32


def cpu_batch_tokens(dtype: torch.dtype) -> int:
    """Tokens in a CPU's forward pass: the activations of more fall out of its cache.

    At depth 4 in fp32, evaluation with 16,384 is up to 40% slower, training with 4,096 up to 10%; in bfloat16 training
    with 2,048 is 10% slower.
    """
    return 4096 if dtype == torch.bfloat16 else 2048


def cpu_rows(sequence_len: int, dtype: torch.dtype) -> int:
    """Rows of so many tokens in a CPU's forward pass that computes in `dtype`; one at least."""
    return max(1, cpu_batch_tokens(dtype) // sequence_len)


def fast_rows(sequence_len: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows in a training's forward pass, where nothing else is asked for."""
    return 32 if device.type == "cuda" else cpu_rows(sequence_len, dtype)


def software() -> str:
    """The versions that a figure depends on: system, Python, torch and its CUDA."""
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}{cuda}"
    )


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU as Linux names them; empty elsewhere."""
    return set(_cpuinfo("flags").split())


def cpu_name() -> str:
    """The CPU's model name, as far as it is known."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of a square matmul, the best of five; on a GPU so large, and so many, that launches hardly count.

    On a CPU it is 2,048 wide: one of 1,024 does not keep AMX busy and would show little over half of its peak.
    """
    size, products = (8192, 5) if device.type == "cuda" else (2048, 1)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = clock()
        for _ in range(products):
            product = a @ b
        product[0, 0].item()
        best = min(best, clock() - start)
    return 2 * size**3 * products / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: torch's counter on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
