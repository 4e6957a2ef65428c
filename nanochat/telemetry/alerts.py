"""Warnings during a run about memory, disk and GPU clocks, with what to do."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat import host
from nanochat.host import GPU, POWER_BRAKE, THERMAL
from nanochat.units import format_bytes, format_gib

LOW_MEMORY = 0.05
"""Share of all memory below which the system starts to swap or to kill processes."""
SLOW_CLOCK, SLOW_SECONDS = 0.75, 60.0
"""A clock this long below this share of its maximum has dropped; shorter is only a pause of the GPU."""
SECONDS_BETWEEN_CHECKS = 10.0
SECONDS_BETWEEN_REPEATS = 3600.0
DROP_CACHE = "sync && echo 3 | sudo tee /proc/sys/vm/drop_caches"


class Alerts:
    """Checks every ten seconds; repeats a warning every hour while its cause lasts."""

    def __init__(self, folder: Path, checkpoint_bytes: int) -> None:
        """`folder`: where checkpoints of `checkpoint_bytes` are saved."""
        self._folder = folder
        self._checkpoint_bytes = checkpoint_bytes
        self._next_check = 0.0
        self._printed: dict[str, float] = {}
        self._max_clock = 0.0
        self._slow_since: float | None = None

    def check(self, readings: Mapping[str, float], gpus: Sequence[GPU], now: float | None = None) -> list[str]:
        """Return the warnings that are due at `now` seconds; `readings` and `gpus` are the sensors'."""
        now = time.monotonic() if now is None else now
        if now < self._next_check:
            return []
        self._next_check = now + SECONDS_BETWEEN_CHECKS
        found = {"memory": memory_alert(readings, gpus), "disk": self._disk(), "clock": self._clock(gpus, now)}
        due = []
        for name, text in found.items():
            if text is None:
                self._printed.pop(name, None)
            elif now - self._printed.get(name, -SECONDS_BETWEEN_REPEATS) >= SECONDS_BETWEEN_REPEATS:
                self._printed[name] = now
                due.append(f"warning: {text}")
        return due

    def _disk(self) -> str | None:
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return None
        if free > self._checkpoint_bytes:
            return None
        return (
            f"{format_bytes(free)} free on disk, the next checkpoint needs {format_bytes(self._checkpoint_bytes)}: "
            f"make room in {self._folder}"
        )

    def _clock(self, gpus: Sequence[GPU], now: float) -> str | None:
        running = [gpu for gpu in gpus if gpu.clock is not None]
        if not running:
            return None
        slowest = min(running, key=lambda gpu: gpu.clock or 0.0)
        clock = slowest.clock or 0.0
        self._max_clock = max(self._max_clock, clock)
        if clock >= SLOW_CLOCK * self._max_clock:
            self._slow_since = None
            return None
        self._slow_since = now if self._slow_since is None else self._slow_since
        if now - self._slow_since < SLOW_SECONDS:
            return None
        heat = "" if slowest.temperature is None else f" at {slowest.temperature:.0f} °C"
        return f"the GPU clock dropped from {self._max_clock:.0f} to {clock:.0f} MHz{heat}: {slowdown(slowest)}"


def memory_alert(readings: Mapping[str, float], gpus: Sequence[GPU]) -> str | None:
    """Return a warning if little memory is available."""
    memory = host.memory()
    available = readings.get("memory_available_bytes")
    if memory is None or available is None or available > LOW_MEMORY * memory.total:
        return None
    left = f"{format_gib(available)} of {format_gib(memory.total)} of memory available"
    advice = "end other programs, or stop with Ctrl-C and resume with half the --device-batch-size"
    if any(gpu.is_gb10 for gpu in gpus):
        cache = format_gib(readings.get("page_cache_bytes", 0))
        advice += f"; to free the page cache ({cache}) for the GPU: {DROP_CACHE}"
    return f"{left}: {advice}"


def slowdown(gpu: GPU) -> str:
    """The reason that the driver gives for a slow GPU, and what to do."""
    if gpu.slowed_by & THERMAL:
        return "too hot: leave space for air on all sides, remove dust, avoid direct sun"
    if gpu.slowed_by & POWER_BRAKE:
        return "not enough power: use the original power supply, directly at the wall, and unplug it for a minute"
    return "see `nvidia-smi -q -d PERFORMANCE`"
