"""Low memory: fewer rows first, then save and stop."""

import re
import threading

import pytest
import torch

from nanochat.errors import UserError
from nanochat.train import memory_guard
from nanochat.train.memory_guard import MemoryGuard
from tests.machine import MEMINFO, FakeMachine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def unified_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_guard, "has_unified_memory", lambda device: True)


def use_memory(machine: FakeMachine, gib: float) -> None:
    machine.write("proc/meminfo", re.sub(r"(MemAvailable: *)\d+", rf"\g<1>{round(gib * 2**20)}", MEMINFO))


def test_low_memory_asks_for_fewer_rows_then_stops_the_run(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_guard, "SECONDS_BETWEEN_READINGS", 0.01)
    monkeypatch.setattr(memory_guard, "SECONDS_TO_RECOVER", 0.1)
    use_memory(machine, 30)
    stopped, lines = threading.Event(), list[str]()
    with MemoryGuard(GPU, lines.append, stopped.set) as guard:
        guard.check(8)
        use_memory(machine, 9)
        assert stopped.wait(30)
    guard.check(1)  # a single row cannot be divided
    with pytest.raises(MemoryError):
        guard.check(8)
    guard.check(8)  # asks once
    assert "9.0 GiB" in lines[0] and "fewer rows" in lines[0] and "stopping" in lines[-1] and len(lines) == 2


def test_the_threshold(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def threshold(gib: float, device: torch.device = GPU) -> float:
        use_memory(machine, gib)
        return memory_guard.memory_threshold(device) / 2**30

    assert threshold(100) == pytest.approx(11.9, abs=0.1)  # a tenth of 119 GiB
    assert threshold(6) == pytest.approx(3)  # already little at the start
    assert threshold(6, CPU) == 0  # a process is killed there, the machine does not freeze
    monkeypatch.setenv(memory_guard.MEMORY_VARIABLE, "20")
    assert threshold(100) == threshold(100, CPU) == 20


@pytest.mark.parametrize("value", ["many", "nan", "inf", "-1"])
def test_a_threshold_that_is_not_a_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory_guard.MEMORY_VARIABLE, value)
    with pytest.raises(UserError, match=f"NANOCHAT_MIN_MEMORY_GIB.*{value}"):
        memory_guard.memory_threshold(GPU)
