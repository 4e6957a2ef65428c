"""Warnings in words while a run goes: what threatens it, and what to do."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat import host
from nanochat.host import GPU, POWER_BRAKE, THERMAL

LOW_MEMORY = 0.05
"""World of all memory below which the system begins to kill or to swap."""
SLOW_CLOCK, SLOW_SECONDS = 0.75, 60.0
"""A clock that stays this long under this share of the best one seen has dropped; shorter is a pause of the GPU."""
SECONDS_BETWEEN_CHECKS = 10.0
SECONDS_BETWEEN_REPEATS = 3600.0
DROP_CACHE = "sync && echo 3 | sudo tee /proc/sys/vm/drop_caches"


class Alerts:
    """Looks now and then; says a thing once, and again each hour that it lasts."""

    def __init__(self, folder: Path, checkpoint_bytes: int) -> None:
        """`folder`: where checkpoints of `checkpoint_bytes` go."""
        self._folder = folder
        self._checkpoint_bytes = checkpoint_bytes
        self._next_check = 0.0
        self._said: dict[str, float] = {}
        self._best_clock = 0.0
        self._slow_since: float | None = None

    def check(self, readings: Mapping[str, float], gpus: Sequence[GPU], now: float | None = None) -> list[str]:
        """What has to be said at `now` seconds; `readings` and `gpus` are the sensors'."""
        now = time.monotonic() if now is None else now
        if now < self._next_check:
            return []
        self._next_check = now + SECONDS_BETWEEN_CHECKS
        found = {"memory": memory_alert(readings, gpus), "disk": self._disk(), "clock": self._clock(gpus, now)}
        due = []
        for name, text in found.items():
            if text is None:
                self._said.pop(name, None)
            elif now - self._said.get(name, -SECONDS_BETWEEN_REPEATS) >= SECONDS_BETWEEN_REPEATS:
                self._said[name] = now
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
            f"the disk has {free / 1e9:.1f} GB free and the next checkpoint takes {self._checkpoint_bytes / 1e9:.1f} "
            f"GB: make room in {self._folder}, or it cannot be saved"
        )

    def _clock(self, gpus: Sequence[GPU], now: float) -> str | None:
        running = [gpu for gpu in gpus if gpu.clock is not None]
        if not running:
            return None
        slowest = min(running, key=lambda gpu: gpu.clock or 0.0)
        clock = slowest.clock or 0.0
        self._best_clock = max(self._best_clock, clock)
        if clock >= SLOW_CLOCK * self._best_clock:
            self._slow_since = None
            return None
        self._slow_since = now if self._slow_since is None else self._slow_since
        if now - self._slow_since < SLOW_SECONDS:
            return None
        heat = "" if slowest.temperature is None else f" at {slowest.temperature:.0f} °C"
        return f"the GPU's clock fell from {self._best_clock:.0f} to {clock:.0f} MHz{heat}: {slowdown(slowest)}"


def memory_alert(readings: Mapping[str, float], gpus: Sequence[GPU]) -> str | None:
    """What to say of the memory left, if it is little."""
    memory = host.memory()
    available = readings.get("memory_available_bytes")
    if memory is None or available is None or available > LOW_MEMORY * memory.total:
        return None
    left = f"{available / 2**30:.1f} of {memory.total / 2**30:.0f} GiB of memory are left"
    advice = "end other programs, or stop with Ctrl-C and go on with half the --device-batch-size"
    if any(gpu.is_gb10 for gpu in gpus):
        cache = readings.get("page_cache_bytes", 0) / 2**30
        advice += f"; the page cache holds {cache:.0f} GiB, which the GPU can have after: {DROP_CACHE}"
    return f"{left}: {advice}"


def slowdown(gpu: GPU) -> str:
    """Why a GPU runs slowly, as far as it says, and what to do."""
    if gpu.slowed_by & THERMAL:
        return "it is too hot: give it air on all sides, and look for dust and for the sun"
    if gpu.slowed_by & POWER_BRAKE:
        return "it lacks power: use the power supply that came with it, straight at the wall; unplug it for a minute"
    return "`nvidia-smi -q -d PERFORMANCE` tells why"
