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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from nanochat.dist import World

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 40.0
"""Time without a heartbeat after which a process that is stopped or on another machine counts as dead."""
GRACE_SECONDS = 5.0
"""Time for processes that fail or end one after the other to do so by themselves."""
START_SECONDS = 1800.0
"""Time for all processes to reach the start of training."""
REMEDY = "rerun the same command without --fresh to resume from the last checkpoint"


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of one process."""

    pid: int
    pid_namespace: str
    host: str
    count: int = 0
    state: str = "running"
    """running, done or failed"""


class Watchdog:
    """A context manager around training in every process. Does nothing with one process."""

    def __init__(self, world: World, report: Callable[[str], None]) -> None:
        """`report` is called with the reason, in the first surviving process, before all of them end."""
        self.world = world
        self._report = report
        self._own = Heartbeat(os.getpid(), pid_namespace(), platform.node())
        self._seen: dict[int, tuple[Heartbeat, float]] = {}
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(address, port, timeout=timedelta(seconds=SILENCE_SECONDS))
            self._send(self._own)
            self._store.wait([f"beat/{rank}" for rank in range(self.world.size)], timedelta(seconds=START_SECONDS))
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
        failed = error is not None and not isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._send(replace(self._own, state="failed" if failed else "done"))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._finished.wait(HEARTBEAT_SECONDS):
            now = time.monotonic()
            if now - last > 5 * HEARTBEAT_SECONDS:  # this process was itself suspended: silence means nothing
                self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
            last = now
            try:
                self._own = replace(self._own, count=self._own.count + 1)
                self._send(self._own)
                self._receive()
            except RuntimeError:
                self._end_run("the main process, or its machine, is gone", [], silent=[0])
            dead = [rank for rank in self._seen if self._is_dead(rank)]
            failed = [rank for rank, (beat, _) in self._seen.items() if beat.state == "failed"]
            if dead:
                exited = [rank for rank in dead if self._has_exited(rank)]
                reason = "was killed (possibly out of memory)" if exited else f"was silent for {SILENCE_SECONDS:.0f} s"
                self._end_run(f"{self._names(exited or dead)} {reason}", dead)
            elif failed and max(self._silence(rank) for rank in failed) > GRACE_SECONDS:
                self._end_run(f"{self._names(failed)} ended with an error", [])

    def _end_run(self, reason: str, dead: list[int], silent: Sequence[int] = ()) -> None:
        """Report once, kill stopped processes on this machine, and end this process. `silent` ranks do not report."""
        if self.world.rank > min(rank for rank in range(self.world.size) if rank not in [*dead, *silent]):
            time.sleep(3 * HEARTBEAT_SECONDS)  # the first survivor reports, before it sees this process end
        else:
            self._report(f"error: {reason}: {REMEDY}")
        for rank in dead:
            beat, _ = self._seen[rank]
            if beat.pid_namespace == self._own.pid_namespace:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        os._exit(1)

    def _send(self, beat: Heartbeat) -> None:
        self._store.set(f"beat/{self.world.rank}", json.dumps(asdict(beat)))

    def _receive(self) -> None:
        for rank in range(self.world.size):
            beat = Heartbeat(**json.loads(self._store.get(f"beat/{rank}")))
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, time.monotonic())

    def _is_dead(self, rank: int) -> bool:
        if self._seen[rank][0].state != "running":
            return False
        return self._has_exited(rank) or self._silence(rank) > SILENCE_SECONDS

    def _has_exited(self, rank: int) -> bool:
        """True if the process is known not to exist. Always False for other machines."""
        beat, _ = self._seen[rank]
        return beat.pid_namespace == self._own.pid_namespace and not is_running(beat.pid)

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self._seen[rank][1]

    def _names(self, ranks: list[int]) -> str:
        """`process 1 (4711 on spark)`."""
        beats = {rank: self._seen[rank][0] for rank in ranks}
        return " and ".join(f"process {rank} ({beat.pid} on {beat.host})" for rank, beat in beats.items())


def in_collective(error: BaseException) -> bool:
    """True if `error` was raised by a collective. `Work.wait`, which only sharding.py calls, has no Python frame."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any("/torch/distributed/" in file or file.endswith("/train/sharding.py") for file in files)


def pid_namespace() -> str:
    """Identifies the boot and the namespace in which a process id is valid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def is_running(pid: int) -> bool:
    """True if the process exists on this machine and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
