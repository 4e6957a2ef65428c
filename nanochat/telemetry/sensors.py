"""Samples GPU temperature, clocks, power and memory during a run, and adds up the energy."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from nanochat import host
from nanochat.host import GPU
from nanochat.spark.plan import MeasuredPlan
from nanochat.telemetry.alerts import Alerts
from nanochat.train.checkpoint import checkpoint_bytes

if TYPE_CHECKING:
    from nanochat.train.run import TrainingRun

SECONDS_BETWEEN_SAMPLES = 5
STALE_SECONDS = 30.0
"""Age at which a sample is ignored: nvidia-smi has died, or hangs in the driver."""


class MachineWatch:
    """Sensors, alerts and the re-estimated plan of one run."""

    def __init__(self, run: "TrainingRun", num_iterations: int, energy_before: float) -> None:
        """`energy_before`: joules that earlier runs of this stage used."""
        self._sensors = Sensors(gpu_ids() if run.runtime.device.type == "cuda" else (), energy_before)
        self._alerts = Alerts(run.folder, checkpoint_bytes(run.model.config))
        self._plan = MeasuredPlan(run.source, run.model.config, num_iterations, run.folder)

    def readings(self) -> dict[str, float]:
        """Values for metrics.jsonl: gpu_temperature_c, gpu_clock_mhz, gpu_power_w, energy_j and memory if measured."""
        return self._sensors.readings()

    def news(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return lines to print after a step; `metrics` are those of the step, readings included."""
        return [*self._alerts.check(metrics, self._sensors.gpus()), *self._plan.step(step, metrics)]

    def close(self) -> None:
        """Stop the sensors."""
        self._sensors.close()


def gpu_ids() -> list[str]:
    """UUIDs, as nvidia-smi prints them, of the GPUs that this run uses on this machine."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]


class Sensors:
    """Reads one long-running nvidia-smi in a thread, and /proc/meminfo on request.

    nvidia-smi --loop repeats by itself, so no process is started during the run, and it ends with its reader. It comes
    with every driver, unlike a Python binding of NVML, and people can type the same command.
    """

    def __init__(self, gpu_ids: Sequence[str] = (), energy_before: float = 0.0) -> None:
        """`gpu_ids`: UUIDs or indices of the run's GPUs, empty on a CPU; `energy_before`: joules of earlier runs."""
        self._energy = energy_before
        self._measures_energy = energy_before > 0
        self._last: dict[str, tuple[float, GPU]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        """held while _process changes"""
        if gpu_ids:
            threading.Thread(target=self._listen, args=(gpu_ids,), name="sensors", daemon=True).start()

    def _listen(self, gpu_ids: Sequence[str]) -> None:
        if self._take_lines(self._start(host.GPU_FIELDS, gpu_ids)):
            self._take_lines(self._start(host.OLDER_GPU_FIELDS, gpu_ids))

    def _start(self, fields: Sequence[str], gpu_ids: Sequence[str]) -> "subprocess.Popen[str] | None":
        command = host.nvidia_smi(fields, f"--id={','.join(gpu_ids)}", f"--loop={SECONDS_BETWEEN_SAMPLES}")
        with self._lock, contextlib.suppress(OSError):
            if not self._is_closed:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is meant for the run, which first finishes its step
                )
                return self._process
        return None

    def _take_lines(self, process: "subprocess.Popen[str] | None") -> bool:
        """Record samples until nvidia-smi ends; return True if an older driver rejected a field."""
        if not process:
            return False
        assert process.stdout
        is_older = False
        for line in process.stdout:
            is_older = is_older or host.is_older(line)
            if gpu := host.parse_gpu(line):
                self.take(gpu, time.monotonic())
        return is_older

    def take(self, gpu: GPU, now: float) -> None:
        """Record a sample of one GPU at `now` seconds, and integrate its power by trapezoids."""
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
        """Maximum temperature, minimum clock, total power and energy of all GPUs, memory; unknown values are absent."""
        gpus = self.gpus(now)
        found: dict[str, float] = {}
        for name, values, combine in (
            ("gpu_temperature_c", [gpu.temperature for gpu in gpus], max),
            ("gpu_clock_mhz", [gpu.clock for gpu in gpus], min),
            ("gpu_power_w", [gpu.power for gpu in gpus], sum),
        ):
            known = [value for value in values if value is not None]
            if known:
                found[name] = combine(known)
        if self._measures_energy:
            found["energy_j"] = self._energy
        memory = host.memory()
        if memory:
            found |= {"memory_available_bytes": memory.available, "page_cache_bytes": memory.page_cache}
        return found

    def close(self) -> None:
        """Terminate nvidia-smi. One that hangs in the driver is abandoned, so that it cannot block the run's end."""
        with self._lock:
            self._is_closed = True
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
