"""Read memory and GPUs of this machine from /proc and nvidia-smi. Standard library only: runs before every stage.

NANOCHAT_ROOT replaces / with another folder, for the tests.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GPU_FIELDS = (
    "name", "uuid", "driver_version", "compute_cap", "temperature.gpu", "clocks.sm", "power.draw",
    "clocks.max.sm", "utilization.gpu", "vbios_version", "clocks_event_reasons.active",
)  # fmt: skip
OLDER_GPU_FIELDS = (*GPU_FIELDS[:-1], "clocks_throttle_reasons.active")  # as older drivers name them
THERMAL, POWER_BRAKE = 0x20 | 0x40, 0x08 | 0x80
"""Bits of clocks_event_reasons: throttled by heat (software, hardware); by a lack of power (hardware)."""
STUCK_CLOCK, STUCK_WATTS = 0.4, 40.0
"""A GB10 stuck in low power runs at 799 of 3,003 MHz and 20 W under load, even after a reboot; a healthy one at 2,400
MHz and 90 W."""
UNPLUG = "shut down and unplug the power supply for a minute"
DROP_CACHE = "sync && echo 3 | sudo tee /proc/sys/vm/drop_caches"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "StrictHostKeyChecking=accept-new")


def root() -> Path:
    return Path(os.environ.get("NANOCHAT_ROOT") or "/")


def read(path: str) -> str:
    """Text of a small file such as `proc/meminfo`, stripped; empty if unreadable."""
    try:
        return (root() / path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def output(*command: str, seconds: float = 10.0) -> str | None:
    """Output of a command; None if it does not exist, fails or times out."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


@dataclass(frozen=True)
class Memory:
    """/proc/meminfo in bytes. On a GB10 this is also the GPU's memory, which NVML does not report."""

    total: int
    available: int
    page_cache: int
    swap_total: int
    swap_free: int


def memory() -> Memory | None:
    """Memory at this moment; None if the system does not report it."""
    lines = (line.split() for line in read("proc/meminfo").splitlines())
    sizes = {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return None
    cached = sizes.get("Cached", 0) + sizes.get("Buffers", 0) - sizes.get("Shmem", 0)
    swap = sizes.get("SwapTotal", 0), sizes.get("SwapFree", 0)
    return Memory(sizes["MemTotal"], sizes["MemAvailable"], max(cached, 0), *swap)


@dataclass(frozen=True)
class GPU:
    """One line of nvidia-smi; fields that it does not report are None."""

    name: str
    uuid: str
    driver: str
    compute_cap: str  # such as 12.1
    temperature: float | None  # degrees Celsius
    clock: float | None  # MHz, of the multiprocessors
    power: float | None  # watts
    max_clock: float | None  # MHz
    utilization: float | None  # percent
    vbios: str  # version of the firmware, such as 9A.0B.25.00.00
    slowed_by: int  # clocks_event_reasons, a bit set

    @property
    def is_gb10(self) -> bool:
        """True for the chip of a DGX Spark, which shares memory with the CPU."""
        return "GB10" in self.name and "GB100" not in self.name

    @property
    def is_stuck(self) -> bool:
        """True for a GB10 that works at a low clock and power for no reason that the driver gives."""
        if not (self.is_gb10 and self.clock and self.max_clock and self.power and self.utilization):
            return False
        is_slow = self.clock < STUCK_CLOCK * self.max_clock and self.power < STUCK_WATTS
        return is_slow and self.utilization >= 90 and not self.slowed_by & (THERMAL | POWER_BRAKE)


def parse_gpu(line: str) -> GPU | None:
    """Parse a line of nvidia-smi with GPU_FIELDS or OLDER_GPU_FIELDS; None for any other line."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(GPU_FIELDS):
        return None
    name, uuid, driver, compute_cap, temperature, clock, power, max_clock, utilization, vbios, reasons = cells
    slowed_by = int(reasons, 16) if reasons.startswith("0x") else 0
    measured = _number(temperature), _number(clock), _number(power), _number(max_clock), _number(utilization)
    return GPU(name, uuid, driver, compute_cap, *measured, vbios.upper(), slowed_by)


def nvidia_smi(fields: Sequence[str], *options: str) -> list[str]:
    """The command that prints `fields`, one line per GPU."""
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *options]


def gpus() -> list[GPU]:
    """NVIDIA GPUs of this machine; empty without a driver."""
    lines = output(*nvidia_smi(GPU_FIELDS)) or output(*nvidia_smi(OLDER_GPU_FIELDS)) or ""
    return [gpu for line in lines.splitlines() if (gpu := parse_gpu(line))]


def slowdown(gpu: GPU) -> str:
    """The reason that the driver gives for a slow GPU, and what to do."""
    if gpu.slowed_by & THERMAL:
        return "too hot: leave space around it, remove dust, keep it out of direct sun"
    if gpu.is_stuck:
        return f"stuck in low power: {UNPLUG}"
    if gpu.slowed_by & POWER_BRAKE:
        return "not enough power: unplug the power supply for a minute; use the original one, directly in a wall outlet"
    return "see `nvidia-smi -q -d PERFORMANCE`"


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A] and similar
        return None
