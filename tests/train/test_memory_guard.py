"""Low memory: fewer rows first, then save and stop."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nanochat.data.batches import StepData
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.telemetry.console import LOG_FILE
from nanochat.tokenizer import Tokenizer
from nanochat.train import memory_guard
from nanochat.train.loop import train
from nanochat.train.memory_guard import MemoryGuard
from tests.machine import MEMINFO, FakeMachine
from tests.training import HOW, OPTIONS, FewRows, batches, begin, losses

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


@pytest.mark.usefixtures("base_dir")
def test_a_run_saves_and_stops_and_then_resumes_with_the_same_losses(
    tokenizer: Tokenizer, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(memory_guard.MEMORY_VARIABLE, "12")
    monkeypatch.setattr(memory_guard, "SECONDS_BETWEEN_READINGS", 0.01)
    printed = {"fewer rows": threading.Event(), "stopping": threading.Event()}

    def recording_guard(device: torch.device, report: Callable[[str], None], stop: Callable[[], None]) -> MemoryGuard:
        def record(line: str) -> None:
            report(line)
            next(event for words, event in printed.items() if words in line).set()

        return MemoryGuard(device, record, stop)

    class FallingMemory:
        """Batches during which another program takes the memory."""

        def step_data(self, step: int) -> StepData:
            if step == 2:
                use_memory(machine, 9)
                assert printed["fewer rows"].wait(30)
            if step == 3:
                monkeypatch.setattr(memory_guard, "SECONDS_TO_RECOVER", 0)
                assert printed["stopping"].wait(30)
            return batches(FewRows()).step_data(step)

    runtime = Runtime.start("cpu")
    straight = begin(runtime, tokenizer, replace(OPTIONS, model_tag="straight"))
    train(straight, batches(FewRows()), 6, **HOW)
    monkeypatch.setattr("nanochat.train.run.MemoryGuard", recording_guard)
    run = begin(runtime, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(run, FallingMemory(), 6, **HOW)
    assert (run.max_rows, run.step) == (2, 4)  # of 4 rows
    log = (run.folder / LOG_FILE).read_text()
    assert re.search(r"step 3: out of memory with 4 rows.*2", log) and re.search(r"9.0 GiB.*saving and stopping", log)
    use_memory(machine, 90)
    resumed = begin(runtime, tokenizer)
    assert resumed.step == 4
    train(resumed, batches(FewRows()), 6, **HOW)
    assert losses(resumed) == pytest.approx(losses(straight), abs=1e-4) and len(losses(resumed)) == 6


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
