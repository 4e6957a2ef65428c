"""Readings during a run."""

import time

import pytest

from nanochat.telemetry.sensors import STALE_SECONDS, Sensors
from tests.machine import GB10, H100, FakeMachine, sample


def test_energy_is_the_area_under_the_power(machine: FakeMachine) -> None:
    sensors = Sensors()
    for second, watts in ((0, 100.0), (10, 200.0), (15, 200.0)):
        sensors.take(sample(power=watts), second)
    assert sensors.readings(now=15)["energy_j"] == pytest.approx(150 * 10 + 200 * 5)


def test_energy_continues_from_an_earlier_run(machine: FakeMachine) -> None:
    sensors = Sensors(energy_before=1000.0)
    sensors.take(sample(power=50.0), 0)
    sensors.take(sample(power=50.0), 2)
    assert sensors.readings(now=2)["energy_j"] == pytest.approx(1100)


def test_readings_of_several_gpus_are_combined(machine: FakeMachine) -> None:
    sensors = Sensors()
    sensors.take(sample(GB10), 0)
    sensors.take(sample(H100), 0)
    readings = sensors.readings(now=1)
    assert readings["gpu_temperature_c"] == 61
    assert readings["gpu_clock_mhz"] == 1980
    assert readings["gpu_power_w"] == pytest.approx(738.5)


def test_without_a_gpu_only_memory_is_read(machine: FakeMachine) -> None:
    assert set(Sensors().readings()) == {"memory_available_bytes", "page_cache_bytes"}


def test_a_stale_sample_is_ignored(machine: FakeMachine) -> None:
    sensors = Sensors()
    sensors.take(sample(), 0)
    assert "gpu_power_w" in sensors.readings(now=STALE_SECONDS - 1)
    assert "gpu_power_w" not in sensors.readings(now=STALE_SECONDS + 1)


def wait_for_the_gpu_clock(sensors: Sensors) -> None:
    until = time.monotonic() + 20
    while "gpu_clock_mhz" not in sensors.readings() and time.monotonic() < until:
        time.sleep(0.01)
    assert sensors.readings()["gpu_clock_mhz"] == 2411


def test_one_nvidia_smi_serves_the_whole_run_and_ends_with_it(machine: FakeMachine) -> None:
    machine.command("nvidia-smi", f"while :; do echo '{GB10}'; sleep 0.05; done")
    sensors = Sensors(["GPU-1"])
    wait_for_the_gpu_clock(sensors)
    sensors.close()
    (call,) = machine.calls
    assert "--id=GPU-1" in call and "--loop=5" in call


def test_older_field_names_are_tried_and_that_nvidia_smi_is_terminated(machine: FakeMachine) -> None:
    machine.older_driver(
        f"trap 'echo ended >>\"{machine.root}/ended\"; exit' TERM; while :; do echo '{GB10}'; sleep 0.05; done"
    )
    sensors = Sensors(["GPU-1"])
    wait_for_the_gpu_clock(sensors)
    sensors.close()
    assert (machine.root / "ended").exists()
    assert len(machine.calls) == 2 and "clocks_throttle_reasons.active" in machine.calls[1]


def test_a_missing_nvidia_smi_is_not_an_error(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.bin))
    sensors = Sensors(["GPU-1"])
    assert "gpu_power_w" not in sensors.readings()
    sensors.close()
