"""Memory and GPUs read from a fake machine."""

from nanochat import host
from tests.machine import GB10, H100, FakeMachine


def test_memory_counts_what_the_page_cache_can_give_back(machine: FakeMachine) -> None:
    memory = host.memory()
    assert memory is not None
    assert (memory.total, memory.available) == (125_000_000 * 1024, 90_000_000 * 1024)
    assert memory.page_cache == 60_000_000 * 1024  # cached and buffers, less what is shared memory
    assert memory.swap_total == memory.swap_free == 16_000_000 * 1024


def test_missing_meminfo_is_not_an_error(machine: FakeMachine) -> None:
    (machine.root / "proc/meminfo").unlink()
    assert host.memory() is None


def test_each_gpu_is_a_line(machine: FakeMachine) -> None:
    machine.gpu(GB10, H100)
    spark, hopper = host.gpus()
    assert (spark.name, spark.compute_cap, spark.temperature, spark.power) == ("NVIDIA GB10", "12.1", 61, 88.5)
    assert spark.is_gb10 and not hopper.is_gb10


def test_unknown_figures_of_a_gpu_are_none(machine: FakeMachine) -> None:
    machine.gpu("NVIDIA GB10, GPU-1, 580.95.05, 12.1, [N/A], [Not Supported], [N/A], [N/A], [N/A], , [N/A]")
    (gpu,) = host.gpus()
    assert (gpu.temperature, gpu.clock, gpu.power, gpu.slowed_by) == (None, None, None, 0)


def test_an_older_driver_is_asked_with_older_field_names(machine: FakeMachine) -> None:
    hot = GB10.replace("0x0000000000000000", "0x0000000000000040")
    machine.older_driver(f"echo '{hot}'")
    (gpu,) = host.gpus()
    assert gpu.slowed_by & host.THERMAL
    assert ["clocks_throttle_reasons.active" in call for call in machine.calls] == [False, True]


def test_a_driver_that_knows_all_fields_is_asked_once(machine: FakeMachine) -> None:
    machine.gpu(GB10)
    assert host.gpus() and len(machine.calls) == 1


def test_without_a_driver_there_are_no_gpus(machine: FakeMachine) -> None:
    machine.command("nvidia-smi", "echo 'NVIDIA-SMI could not communicate with the driver'; exit 9")
    assert host.gpus() == []


def test_a_command_that_hangs_times_out(machine: FakeMachine) -> None:
    machine.command("nvidia-smi", "exec sleep 30")
    assert host.output("nvidia-smi", seconds=0.2) is None
