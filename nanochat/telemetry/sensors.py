"""What the machine feels while a run goes: heat, clocks, power, memory; and the energy used so far."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Sequence

from nanochat import host
from nanochat.host import GPU

SECONDS_BETWEEN_SAMPLES = 5
STALE_SECONDS = 30.0
"""A sample as old as this says nothing of now: nvidia-smi has gone, or hangs with the driver."""


class Sensors:
    """One nvidia-smi for the whole run, read by a thread; /proc/meminfo when asked.

    nvidia-smi repeats by itself (--loop), so nothing is started during the run, and it ends with its reader. It is
    taken before a binding of NVML since it is there with every driver, and its lines are what a person sees who
    types the same command.
    """

    def __init__(self, gpu_ids: Sequence[str] = (), energy_before: float = 0.0) -> None:
        """`gpu_ids`: UUIDs or numbers of the run's GPUs, none on a CPU; `energy_before`: joules of earlier runs."""
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
        """Take what nvidia-smi prints; where its driver is older, ask again in its words."""
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
                    start_new_session=True,  # Ctrl-C is for the run, which goes on to the end of its step
                )
                return self._process
        return None

    def _take_lines(self, process: "subprocess.Popen[str] | None") -> bool:
        """Take samples until nvidia-smi ends; whether it did since it does not know a field."""
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
        """A sample of one GPU at `now` seconds. Energy is the area under its power, by trapezoids."""
        before = self._last.get(gpu.uuid)
        if gpu.power is not None:
            self._measures_energy = True
            if before and before[1].power is not None:
                self._energy += (before[1].power + gpu.power) / 2 * (now - before[0])
        self._last[gpu.uuid] = (now, gpu)

    def gpus(self, now: float | None = None) -> list[GPU]:
        """The last sample of each GPU, where it is not too old to count."""
        now = time.monotonic() if now is None else now
        return [gpu for taken, gpu in self._last.copy().values() if now - taken < STALE_SECONDS]

    def readings(self, now: float | None = None) -> dict[str, float]:
        """What metrics.jsonl gets: the hottest GPU, the slowest clock, power and energy of all. Absent if unknown."""
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
        """End nvidia-smi. One that hangs in the driver is left behind: the run's end must not wait for it."""
        with self._lock:
            self._is_closed = True
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
