"""Low memory: fewer rows first, then save and stop."""

import re
import threading

import pytest
import torch

from nanochat.errors import UserError
from nanochat.train import watchdog
from nanochat.train.watchdog import MemoryGuard
from tests.machine import MEMINFO, FakeMachine

CPU = torch.device("cpu")


def use_memory(machine: FakeMachine, gib: float) -> None:
    machine.write("proc/meminfo", re.sub(r"(MemAvailable: *)\d+", rf"\g<1>{round(gib * 2**20)}", MEMINFO))


def test_low_memory_asks_for_fewer_rows_then_stops_the_run(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN_READINGS", 0.01)
    monkeypatch.setattr(watchdog, "SECONDS_TO_RECOVER", 0.1)
    use_memory(machine, 30)
    stopped, lines = threading.Event(), list[str]()
    with MemoryGuard(CPU, lines.append, stopped.set) as guard:
        guard.check()
        use_memory(machine, 9)
        assert stopped.wait(30)
    with pytest.raises(MemoryError):
        guard.check()
    guard.check()  # asks once
    assert "9.0 GiB" in lines[0] and "fewer rows" in lines[0] and "stopping" in lines[-1] and len(lines) == 2


def test_the_threshold(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def threshold(gib: float) -> float:
        use_memory(machine, gib)
        return MemoryGuard(CPU, print, lambda: None).threshold / 2**30

    assert threshold(100) == pytest.approx(11.9, abs=0.1)  # a tenth of 119 GiB
    assert threshold(6) == pytest.approx(3)  # already little at the start
    monkeypatch.setenv(watchdog.MEMORY_VARIABLE, "20")
    assert threshold(100) == 20
    monkeypatch.setenv(watchdog.MEMORY_VARIABLE, "many")
    with pytest.raises(UserError, match=r"NANOCHAT_MIN_MEMORY_GIB.*many"):
        threshold(100)
