"""Ends all processes of a run, with a message, when one of them is gone or stuck.

They meet in every step, so one that never comes would hold up the others, silently and for hours: a collective's own
time limit has to be long enough for the longest evaluation. Here a thread of each process says every second that it is
alive and how long its main thread has not moved, in a store of key and value that torchrun runs (TCPStore). What to
look for is not the time a step may take, which differs by a thousand, but whether anything moves at all.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

from nanochat.runtime import Runtime

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 40.0
"""Without a sign of life after which a process on another machine, or one that was stopped, counts as gone."""
STILL_SECONDS = 40.0
"""Without a move of any process after which they count as stuck, where steps are short."""
STILL_STEPS = 2
"""The same in steps as long as the longest so far, where that is more."""
STILL_SECONDS_AT_FIRST = 1800.0
"""The same until two steps are taken: compiling waits for compilers, and the second tells how long a step is."""
SECONDS_OF_GRACE = 5.0
"""For processes that end one after the other to do so by themselves."""
WAITING = (
    "/torch/distributed/",
    *(f"/nanochat/{name}.py" for name in ("runtime", "train/gradients", "train/optim", "train/sharding")),
)
"""Where a main thread stands that waits for the others."""
SAVING = "/nanochat/train/saving.py"
"""Where it waits for the disk: that takes as long as it takes."""
REMEDY = "run the same command again, without --fresh: it goes on from the last checkpoint"


@dataclass(frozen=True)
class Beat:
    """A sign of life of one process."""

    pid: int
    pids: str
    """where that number means this process: a boot of a machine, and a namespace of numbers"""
    host: str
    count: int = 0
    still_seconds: float = 0.0
    """since its main thread moved"""
    where: str = ""
    """the line of this project that its main thread is in"""
    waits: bool = False
    """whether it is there to wait for the others"""
    state: str = "running"
    """running, saving, done or failed"""


class Stand(NamedTuple):
    """Where a main thread is at one moment."""

    stack: tuple[tuple[int, int], ...]
    """code object and instruction of every frame"""
    files: tuple[str, ...]
    where: str


class Watchdog:
    """A context manager around the loop of every process. Does nothing where there is only one."""

    def __init__(self, runtime: Runtime, say: Callable[[str], None]) -> None:
        """`say` tells a person why the run ends; the first of the processes that are left calls it."""
        self._rank, self._world_size = runtime.world.rank, runtime.world.size
        self._say = say
        self.still_limit = STILL_SECONDS_AT_FIRST
        self._longest_step = 0.0
        self._steps = 0
        self._beat = Beat(os.getpid(), own_pids(), platform.node())
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._main_thread = threading.get_ident()
        self._stand = (self._where_main_stands(), time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            self._store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=SILENCE_SECONDS)
            )
            self._send(self._beat)
            everyone = [f"beat/{rank}" for rank in range(self._world_size)]
            self._store.wait(everyone, timedelta(seconds=STILL_SECONDS_AT_FIRST))  # so that each is known by name
            self._hear()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._world_size == 1:
            return
        if isinstance(error, RuntimeError) and at_a_meeting(error):
            # Another process closed its connection. The thread finds out which and why, says it, and ends this one.
            time.sleep(2 * SECONDS_OF_GRACE + 2 * BEAT_SECONDS)
        self._ended.set()
        self._thread.join()
        failed = error is not None and not isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._send(replace(self._beat, state="failed" if failed else "done"))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each optimizer step: the first compiles, and from the others follows how long stillness is no sign.

        A main thread that waits for its GPU does not move, at worst for all of a step, and that is minutes where
        a large model is trained on a small machine.
        """
        begun = time.monotonic()
        yield
        self._steps += 1
        if self._steps > 1:
            self._longest_step = max(self._longest_step, time.monotonic() - begun)
            self.still_limit = max(STILL_SECONDS, STILL_STEPS * self._longest_step)

    def compiles_again(self) -> None:
        """The step that is being taken is as slow as the first: its batches have another shape."""
        self._steps = 0
        self.still_limit = STILL_SECONDS_AT_FIRST

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            awake, last = time.monotonic() - last < 5 * BEAT_SECONDS, time.monotonic()
            if not awake:  # this process was stopped itself, perhaps all were: nobody's silence counts
                self._heard = {rank: (beat, last) for rank, (beat, _) in self._heard.items()}
            try:
                self._send(self._new_beat())
                beats = self._hear()
            except RuntimeError:
                self._end_all("the process that started this one, or its machine, is gone", {})
                return
            for find in (self._gone, self._stuck):
                if found := find(beats):
                    self._end_all(found, beats)
                    return

    def _end_all(self, verdict: str, beats: dict[int, Beat]) -> None:
        """Say it once, end what cannot end itself, and this process too, wherever its main thread is."""
        sentence = f"error: {verdict}: {REMEDY}"
        lost = self._lost(beats)
        alive = [rank for rank in range(self._world_size) if rank not in lost]
        if self._rank > min(alive):
            time.sleep(3 * BEAT_SECONDS)  # let that one find the same and say it, before this one's end is all it sees
        else:
            self._say(sentence)
        for rank in lost:
            if beats[rank].pids == self._beat.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beats[rank].pid, signal.SIGKILL)
        os._exit(1)

    def _new_beat(self) -> Beat:
        stand, now = self._where_main_stands(), time.monotonic()
        if stand.stack != self._stand[0].stack:
            self._stand = (stand, now)
        self._beat = replace(
            self._beat,
            count=self._beat.count + 1,
            still_seconds=now - self._stand[1],
            where=stand.where,
            waits=any(place in file for file in stand.files for place in WAITING),
            state="saving" if any(SAVING in file for file in stand.files) else "running",
        )
        return self._beat

    def _where_main_stands(self) -> Stand:
        frame = sys._current_frames().get(self._main_thread)
        stack, files, where = [], [], ""
        while frame:
            file = frame.f_code.co_filename
            stack.append((id(frame.f_code), frame.f_lasti))
            files.append(file)
            if not where and ("/nanochat/" in file or "/scripts/" in file):
                where = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return Stand(tuple(stack), tuple(files), where)

    def _send(self, beat: Beat) -> None:
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _hear(self) -> dict[int, Beat]:
        """The last beat of each process."""
        for rank in range(self._world_size):
            beat = Beat(**json.loads(self._store.get(f"beat/{rank}")))
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = (beat, time.monotonic())
        return {rank: beat for rank, (beat, _) in self._heard.items()}

    def _lost(self, beats: dict[int, Beat]) -> list[int]:
        """Processes that are not there any more, or give no sign of it."""
        return [
            rank
            for rank, beat in beats.items()
            if beat.state not in ("done", "failed") and (self._silence(rank) > SILENCE_SECONDS or self._is_dead(beat))
        ]

    def _is_dead(self, beat: Beat) -> bool:
        """Whether the process is known not to exist; on another machine that cannot be known."""
        return beat.pids == self._beat.pids and not exists(beat.pid)

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank][1]

    def _gone(self, beats: dict[int, Beat]) -> str | None:
        failed = [rank for rank, beat in beats.items() if beat.state == "failed"]
        if failed and max(map(self._silence, failed)) > SECONDS_OF_GRACE:  # it was not the same error in all
            return f"{named(failed, beats)} ended with an error"
        lost = self._lost(beats)
        dead = [rank for rank in lost if self._is_dead(beats[rank])]
        if dead:
            return f"{named(dead, beats)} was killed, perhaps for want of memory"
        return f"{named(lost, beats)} has given no sign of life for {SILENCE_SECONDS:.0f} s" if lost else None

    def _stuck(self, beats: dict[int, Beat]) -> str | None:
        running = {rank: beat for rank, beat in beats.items() if beat.state != "done"}
        if len(running) < self._world_size or any(
            beat.state == "saving" or beat.still_seconds < self.still_limit for beat in running.values()
        ):
            return None
        guilty = [rank for rank, beat in running.items() if not beat.waits] or list(running)
        places = ", ".join(f"process {rank} in {beat.where}" for rank, beat in running.items())
        return f"{named(guilty, beats)} is stuck; nothing has moved for {self.still_limit:.0f} s ({places})"


def at_a_meeting(error: BaseException) -> bool:
    """Whether it was raised where processes wait for each other."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(place in file for file in files for place in WAITING)


def named(ranks: list[int], beats: dict[int, Beat]) -> str:
    """For a person: `process 1 (4711 on spark)`."""
    return " and ".join(f"process {rank} ({beats[rank].pid} on {beats[rank].host})" for rank in ranks)


def own_pids() -> str:
    """Identifies the processes that this one's numbers of processes speak of."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def exists(pid: int) -> bool:
    """Whether there is such a process on this machine; one that has ended and whose parent has not noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
