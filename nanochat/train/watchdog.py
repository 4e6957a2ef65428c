"""End all processes of a run when one dies, and name it, instead of letting the others wait in a collective.

A thread in each process writes a heartbeat to the key-value store of torchrun (TCPStore) every second and reads those
of the others. A process that is alive but stuck is left to the timeouts of torch.distributed (NCCL, gloo).
"""

import contextlib
import json
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

from nanochat.dist import World

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 40.0
"""Time without a heartbeat after which a process that is stopped or on another machine counts as dead."""
GRACE_SECONDS = 5.0  # time for processes that fail or end one after the other to do so by themselves
START_SECONDS = 1800.0  # time for all processes to reach the start of training


class Process(NamedTuple):
    pid: int
    pid_namespace: str
    host: str


class Watchdog:
    """A context manager around training in every process. Does nothing with one process."""

    def __init__(self, world: World, report: Callable[[str], None]) -> None:
        """`report` is called with the reason, in the first surviving process, before all of them end."""
        self.world = world
        self._report = report
        self._own = Process(os.getpid(), pid_namespace(), platform.node())
        self._beats: dict[int, tuple[str, float]] = {}  # by rank: last heartbeat, `done` or `failed`; time of arrival
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(address, port, timeout=timedelta(seconds=SILENCE_SECONDS))
            self._send("started")
            self._store.set(f"process/{self.world.rank}", json.dumps(self._own))
            keys = [f"process/{rank}" for rank in range(self.world.size)]
            self._store.wait(keys, timedelta(seconds=START_SECONDS))
            self._processes = [Process(*json.loads(self._store.get(key))) for key in keys]
            self._receive()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.world.size == 1:
            return
        if isinstance(error, RuntimeError) and in_collective(error):
            # Another process closed its connection. The thread finds out which one, reports it and ends this process.
            time.sleep(2 * GRACE_SECONDS + 2 * HEARTBEAT_SECONDS)
        self._finished.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._send("done" if error is None or isinstance(error, KeyboardInterrupt) else "failed")

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._finished.wait(HEARTBEAT_SECONDS):
            now = time.monotonic()
            if now - last > 5 * HEARTBEAT_SECONDS:  # this process was itself suspended: silence means nothing
                self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}
            last = now
            try:
                self._send(str(now))
                self._receive()
            except RuntimeError:
                self._end_run("the main process, or its machine, is gone", [], silent=[0])
            silence = {rank: now - arrived for rank, (_, arrived) in self._beats.items()}
            failed = [rank for rank, (beat, _) in self._beats.items() if beat == "failed"]
            running = [rank for rank, (beat, _) in self._beats.items() if beat not in ("failed", "done")]
            exited = [rank for rank in running if self._has_exited(self._processes[rank])]
            silent = [rank for rank in running if silence[rank] > SILENCE_SECONDS]
            if exited:
                self._end_run(f"{self._names(exited)} was killed (possibly out of memory)", exited + silent)
            elif silent:
                self._end_run(f"{self._names(silent)} was silent for {SILENCE_SECONDS:.0f} s", silent)
            elif any(silence[rank] > GRACE_SECONDS for rank in failed):
                self._end_run(f"{self._names(failed)} ended with an error", [])

    def _end_run(self, reason: str, dead: list[int], silent: Sequence[int] = ()) -> None:
        """Report once, kill stopped processes on this machine, and end this process. `silent` ranks do not report."""
        if self.world.rank > min(rank for rank in range(self.world.size) if rank not in [*dead, *silent]):
            time.sleep(3 * HEARTBEAT_SECONDS)  # the first survivor reports, before it sees this process end
        else:
            self._report(f"error: {reason}: rerun the same command without --fresh to resume from the last checkpoint")
        for rank in dead:
            if self._processes[rank].pid_namespace == self._own.pid_namespace:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._processes[rank].pid, signal.SIGKILL)
        os._exit(1)

    def _send(self, beat: str) -> None:
        self._store.set(f"beat/{self.world.rank}", beat)

    def _receive(self) -> None:
        for rank in range(self.world.size):
            beat = self._store.get(f"beat/{rank}").decode()
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, time.monotonic())

    def _has_exited(self, process: Process) -> bool:
        """True if the process does not exist or is a zombie. Always False for other machines."""
        if process.pid_namespace != self._own.pid_namespace:
            return False
        try:
            return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _names(self, ranks: list[int]) -> str:
        """`process 1 (4711 on spark)`."""
        named = ((rank, self._processes[rank]) for rank in ranks)
        return " and ".join(f"process {rank} ({process.pid} on {process.host})" for rank, process in named)


def in_collective(error: BaseException) -> bool:
    """True if `error` was raised by a collective. `Work.wait`, which only sharding.py calls, has no Python frame."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any("/torch/distributed/" in file or file.endswith("/train/sharding.py") for file in files)


def pid_namespace() -> str:
    """Identifies the boot and the namespace in which a process id is valid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
