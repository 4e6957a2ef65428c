"""Warnings about memory, disk and clocks."""

import re
from pathlib import Path

import pytest

from nanochat.host import GPU
from nanochat.telemetry.sensors import Alerts
from tests.machine import MEMINFO, FakeMachine, sample


def alerts(folder: Path, checkpoint_bytes: int = 1) -> Alerts:
    return Alerts(folder, checkpoint_bytes)


def use_memory(machine: FakeMachine, available_kilobytes: int = 3 * 2**20) -> None:
    text = re.sub(r"(MemAvailable: *)\d+", rf"\g<1>{available_kilobytes}", MEMINFO)
    machine.write("proc/meminfo", text)


def test_a_healthy_machine_causes_no_warning(machine: FakeMachine) -> None:
    assert alerts(machine.root).check([sample()], now=0) == []


def test_low_memory_is_reported_with_a_fix(machine: FakeMachine) -> None:
    use_memory(machine)
    (warning,) = alerts(machine.root).check([], now=0)
    assert warning.startswith("warning: 3.0 GiB of 119.2 GiB") and "--device-batch-size" in warning
    assert "page cache" not in warning
    (unified,) = alerts(machine.root).check([sample()], now=0)
    assert "page cache (57.2 GiB)" in unified and "drop_caches" in unified


def test_a_disk_too_small_for_the_next_checkpoint_is_reported(machine: FakeMachine) -> None:
    (warning,) = alerts(machine.root, 10**18).check([], now=0)
    assert "1,000,000,000 GB" in warning and str(machine.root) in warning


@pytest.mark.parametrize(
    ("slowed_by", "words"), [(0x40, "too hot"), (0x80, "not enough power"), (0, "nvidia-smi -q -d PERFORMANCE")]
)
def test_a_dropped_clock_is_reported_after_a_minute(machine: FakeMachine, slowed_by: int, words: str) -> None:
    watch = alerts(machine.root)
    slow: list[GPU] = [sample(clock=1100.0, temperature=86.0, slowed_by=slowed_by)]
    assert watch.check([sample(clock=2400.0)], now=0) == []
    assert watch.check(slow, now=20) == []
    (warning,) = watch.check(slow, now=90)
    assert "from 2400 to 1100 MHz at 86 °C" in warning and words in warning


def test_low_power_under_load_is_reported_at_once(machine: FakeMachine) -> None:
    (warning,) = alerts(machine.root).check([sample(clock=799.0, power=19.5, utilization=100.0)], now=0)
    assert "799 of 3003 MHz" in warning and "unplug" in warning


def test_a_short_pause_of_the_gpu_is_ignored(machine: FakeMachine) -> None:
    watch = alerts(machine.root)
    clocks = [2400.0, 300.0, 2400.0, 300.0, 2400.0]
    assert [watch.check([sample(clock=c)], now=40.0 * i) for i, c in enumerate(clocks)] == [[]] * 5


def test_a_warning_is_repeated_after_an_hour_or_when_it_comes_back(machine: FakeMachine) -> None:
    watch = alerts(machine.root)
    warnings = []
    for minute, is_low in ((0, True), (1, True), (59, True), (60, True), (61, False), (62, True)):
        use_memory(machine, 3 * 2**20 if is_low else 90_000_000)
        warnings.append(len(watch.check([], now=minute * 60)))
    assert warnings == [1, 0, 0, 1, 0, 1]
