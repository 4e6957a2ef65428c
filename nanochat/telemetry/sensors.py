"""Samples GPU temperature, clocks, power and memory during a run, adds up the energy, and warns of problems."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanochat import host
from nanochat.host import DROP_CACHE, GPU, slowdown
from nanochat.spark.plan import MeasuredPlan
from nanochat.train.checkpoint import checkpoint_bytes
from nanochat.units import format_bytes, format_gib

if TYPE_CHECKING:
    from nanochat.train.run import TrainingRun

SECONDS_BETWEEN_SAMPLES = 5
STALE_SECONDS = 30.0  # age at which a sample is ignored: nvidia-smi has died, or hangs in the driver
LOW_MEMORY = 0.05
"""Fraction of memory available below which the system starts to swap or to kill processes."""
SLOW_CLOCK, SLOW_SECONDS = 0.75, 60.0
"""A clock this long below this fraction of its maximum has dropped; for less time, the GPU is only idle."""
SECONDS_BETWEEN_CHECKS = 10.0
SECONDS_BETWEEN_REPEATS = 3600.0


class Sensors:
    """Reads one long-running nvidia-smi in a thread, and /proc/meminfo on request.

    nvidia-smi --loop repeats by itself, so no process is started during the run, and it ends with its reader. It ships
    with every driver, unlike a Python binding of NVML, and people can run the same command.
    """

    def __init__(self, gpu_ids: Sequence[str] = (), energy_before: float = 0.0) -> None:
        """`gpu_ids`: UUIDs or indices of the run's GPUs, empty on a CPU; `energy_before`: joules of earlier runs."""
        self._energy = energy_before
        self._measures_energy = energy_before > 0
        self._last: dict[str, tuple[float, GPU]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
        self._lock = threading.Lock()  # held while _process changes
        if gpu_ids:
            threading.Thread(target=self._listen, args=(gpu_ids,), name="sensors", daemon=True).start()

    def _listen(self, gpu_ids: Sequence[str]) -> None:
        for fields in (host.GPU_FIELDS, host.OLDER_GPU_FIELDS):
            with self._lock:
                if self._is_closed or self._last:
                    return
                try:
                    self._process = subprocess.Popen(
                        host.nvidia_smi(fields, f"--id={','.join(gpu_ids)}", f"--loop={SECONDS_BETWEEN_SAMPLES}"),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                        start_new_session=True,  # Ctrl-C is meant for the run, which first finishes its step
                    )
                except OSError:
                    return
            assert self._process.stdout
            for line in self._process.stdout:
                if gpu := host.parse_gpu(line):
                    self.take(gpu, time.monotonic())

    def take(self, gpu: GPU, now: float) -> None:
        """Record a sample of one GPU at `now` seconds, and integrate its power by the trapezoidal rule."""
        before = self._last.get(gpu.uuid)
        if gpu.power is not None:
            self._measures_energy = True
            if before and before[1].power is not None:
                self._energy += (before[1].power + gpu.power) / 2 * (now - before[0])
        self._last[gpu.uuid] = (now, gpu)

    def gpus(self, now: float | None = None) -> list[GPU]:
        """The last sample of each GPU, unless it is stale."""
        now = time.monotonic() if now is None else now
        return [gpu for taken, gpu in self._last.copy().values() if now - taken < STALE_SECONDS]

    def readings(self, now: float | None = None) -> dict[str, float]:
        """Values for metrics.jsonl: maximum temperature, minimum clock, total power and energy of all GPUs, memory.

        Unknown values are absent.
        """
        gpus = self.gpus(now)
        found: dict[str, float] = {}
        for name, values, combine in (
            ("gpu_temperature_c", [gpu.temperature for gpu in gpus], max),
            ("gpu_clock_mhz", [gpu.clock for gpu in gpus], min),
            ("gpu_power_w", [gpu.power for gpu in gpus], sum),
        ):
            if known := [value for value in values if value is not None]:
                found[name] = combine(known)
        if self._measures_energy:
            found["energy_j"] = self._energy
        if memory := host.memory():
            found |= {"memory_available_bytes": memory.available, "page_cache_bytes": memory.page_cache}
        return found

    def close(self) -> None:
        """Terminate nvidia-smi. One that hangs in the driver is abandoned, so that it does not block the run's end."""
        with self._lock:
            self._is_closed = True
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)


@dataclass
class Alerts:
    """Checks memory, disk and GPU clocks every ten seconds; repeats a warning every hour while its cause lasts."""

    folder: Path
    checkpoint_bytes: int  # size of each checkpoint saved in `folder`
    _next_check: float = 0.0
    _printed: dict[str, float] = field(default_factory=dict)
    _max_clock: float = 0.0
    _slow_since: float | None = None

    def check(self, gpus: Sequence[GPU], now: float | None = None) -> list[str]:
        """Return the warnings that are due at `now` seconds; `gpus`: the sensors' last samples."""
        now = time.monotonic() if now is None else now
        if now < self._next_check:
            return []
        self._next_check = now + SECONDS_BETWEEN_CHECKS
        found = {"memory": self._memory(gpus), "disk": self._disk(), "clock": self._clock(gpus, now)}
        due = []
        for name, text in found.items():
            if text is None:
                self._printed.pop(name, None)
            elif now - self._printed.get(name, -SECONDS_BETWEEN_REPEATS) >= SECONDS_BETWEEN_REPEATS:
                self._printed[name] = now
                due.append(f"warning: {text}")
        return due

    def _memory(self, gpus: Sequence[GPU]) -> str | None:
        memory = host.memory()
        if memory is None or memory.available > LOW_MEMORY * memory.total:
            return None
        advice = "end other programs, or stop with Ctrl-C and resume with half the --device-batch-size"
        if any(gpu.is_gb10 for gpu in gpus):
            advice += f"; to free the page cache ({format_gib(memory.page_cache)}) for the GPU: {DROP_CACHE}"
        return f"{format_gib(memory.available)} of {format_gib(memory.total)} of memory available: {advice}"

    def _disk(self) -> str | None:
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return None
        if free > self.checkpoint_bytes:
            return None
        return (
            f"{format_bytes(free)} free on disk, the next checkpoint needs {format_bytes(self.checkpoint_bytes)}: "
            f"make room in {self.folder}"
        )

    def _clock(self, gpus: Sequence[GPU], now: float) -> str | None:
        if stuck := [gpu for gpu in gpus if gpu.is_stuck]:
            gpu = stuck[0]
            return f"the GPU works at {gpu.clock:.0f} of {gpu.max_clock:.0f} MHz, {gpu.power:.0f} W: {slowdown(gpu)}"
        clocks = [(gpu.clock, gpu) for gpu in gpus if gpu.clock is not None]
        if not clocks:
            return None
        clock, slowest = min(clocks, key=lambda pair: pair[0])
        self._max_clock = max(self._max_clock, clock)
        if clock >= SLOW_CLOCK * self._max_clock:
            self._slow_since = None
            return None
        self._slow_since = now if self._slow_since is None else self._slow_since
        if now - self._slow_since < SLOW_SECONDS:
            return None
        heat = "" if slowest.temperature is None else f" at {slowest.temperature:.0f} °C"
        return f"the GPU clock dropped from {self._max_clock:.0f} to {clock:.0f} MHz{heat}: {slowdown(slowest)}"


class MachineWatch(Sensors):
    """Sensors, alerts and the re-estimated plan of one run."""

    def __init__(self, run: "TrainingRun", num_iterations: int, energy_before: float) -> None:
        """`energy_before`: joules that earlier runs of this stage used."""
        gpu_ids: list[str] = []
        if run.runtime.device.type == "cuda":  # UUIDs, as nvidia-smi prints them
            count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            gpu_ids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
        super().__init__(gpu_ids, energy_before)
        self._alerts = Alerts(run.folder, checkpoint_bytes(run.model.config))
        self._plan = MeasuredPlan(run.source, run.model.config, num_iterations)

    def news(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return lines to print after a step; `metrics` are those of the step, readings included."""
        return [*self._alerts.check(self.gpus()), *self._plan.step(step, metrics)]
