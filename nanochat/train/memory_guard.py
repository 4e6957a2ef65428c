"""Act before a GPU that shares the CPU's memory, such as a GB10's, runs out of it: the machine would freeze."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat import host
from nanochat.errors import UserError
from nanochat.runtime import has_unified_memory
from nanochat.units import format_gib

MEMORY_VARIABLE = "NANOCHAT_MIN_MEMORY_GIB"
MIN_AVAILABLE, MAX_SHARE = 12 << 30, 0.1
"""Driver errors were reported with 12.7 GiB available. On smaller machines a tenth of the memory."""
SECONDS_BETWEEN_READINGS = 0.5
SECONDS_TO_RECOVER = 10.0  # for the forward pass under way, then for the step with fewer rows
OOM_SCORE_ADJ = "500"


class MemoryGuard:
    """A context manager around training. Without a GPU, it acts only if NANOCHAT_MIN_MEMORY_GIB is set.

    While memory is low, it releases the cache of torch's allocator, then makes `check` raise MemoryError once, upon
    which the loop takes fewer rows, then calls `stop`.
    """

    def __init__(self, device: torch.device, report: Callable[[str], None], stop: Callable[[], None]) -> None:
        """Raises UserError if NANOCHAT_MIN_MEMORY_GIB is not a number."""
        self._report, self._stop = report, stop
        self._wants_fewer_rows, self._waiting_since = False, 0.0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory guard", daemon=True)
        self.threshold = memory_threshold(device)

    def __enter__(self) -> "MemoryGuard":
        with contextlib.suppress(OSError):  # if a process has to be killed, it is this one, not the desktop or sshd
            Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ)
        if self.threshold:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()

    def check(self, rows: int) -> None:
        """Called before a forward pass of `rows` rows. Raises MemoryError if the step should run with fewer."""
        if self._wants_fewer_rows and rows > 1:
            self._wants_fewer_rows, self._waiting_since = False, time.monotonic()
            raise MemoryError("memory is low")

    def _watch(self) -> None:
        readings = 0
        while not self._finished.wait(SECONDS_BETWEEN_READINGS):
            memory = host.memory()
            if memory is None or memory.available >= self.threshold:
                readings, self._wants_fewer_rows = 0, False
                continue
            readings += 1
            left = f"warning: {format_gib(memory.available)} of memory left, below {format_gib(self.threshold)}"
            if readings == 1:
                self._waiting_since = time.monotonic()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            elif readings == 2:
                self._wants_fewer_rows = True
                self._report(f"{left}: taking fewer rows at once")
            elif time.monotonic() - self._waiting_since > SECONDS_TO_RECOVER:
                self._report(f"{left}: saving and stopping before the machine freezes; end other programs")
                self._stop()
                return


def memory_threshold(device: torch.device) -> float:
    """Bytes below which memory is low; 0 to never act. Half of what is available at the start if that is little."""
    text, memory = os.environ.get(MEMORY_VARIABLE), host.memory()
    if text:
        try:
            gib = float(text)
            if not 0 <= gib < math.inf:
                raise ValueError
            return gib * 2**30
        except ValueError:
            raise UserError(f'{MEMORY_VARIABLE} must be a number such as {MEMORY_VARIABLE}=8, got "{text}"') from None
    if device.type != "cuda" or not has_unified_memory(device) or memory is None:
        return 0.0
    return min(MIN_AVAILABLE, MAX_SHARE * memory.total, memory.available / 2)
