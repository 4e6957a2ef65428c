"""The variables that scripts/env.sh sets on fake machines."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine import FakeMachine

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = "OMP_NUM_THREADS|NCCL_.*|PYTORCH_.*|MALLOC_.*|NANOCHAT_FOUND"

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_TOP_PAD_": "67108864",
}  # fmt: skip


def run_sourced(script: str, **variables: str) -> str:
    """Return the output of a script after env.sh, which runs in a project with these scripts and an empty setup.sh."""
    program = (
        "unset ${!NCCL_*} OMP_NUM_THREADS\n"
        f"{''.join(f'export {name}={value!r}; ' for name, value in variables.items())}\n"
        f'source "$PROJECT/scripts/env.sh"\n{script}'
    )
    return subprocess.run(["bash", "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


def environment(**variables: str) -> dict[str, str]:
    """Return the variables that env.sh sets."""
    lines = run_sourced(f"env | grep -E '^({NAMES})=' || true", **variables).splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up a project whose setup.sh does nothing, and an environment without what env.sh sets."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    (project / "setup.sh").write_text("#!/bin/sh\n")
    (project / "setup.sh").chmod(0o755)
    monkeypatch.setenv("PROJECT", str(project))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("CUDA_HOME", "LD_LIBRARY_PATH", "TRITON_PTXAS_PATH", "PYTORCH_ALLOC_CONF", "NANOCHAT_FOUND", *MALLOC):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_of_equal_cores_and_one_network_is_left_alone(machine: FakeMachine) -> None:
    machine.write("dev/nvidia0", "")
    assert environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_without_a_gpu_glibc_keeps_what_is_freed(machine: FakeMachine) -> None:
    assert {name: value for name, value in environment().items() if name in MALLOC} == MALLOC
    assert environment(MALLOC_TOP_PAD_="0")["MALLOC_TOP_PAD_"] == "0"


def test_the_torch_of_nvidia_s_image_is_not_loaded(machine: FakeMachine) -> None:
    theirs = "/usr/local/lib/python3.12/dist-packages/torch/lib"
    for path, kept in ((f"{theirs}:/usr/local/cuda/compat/lib", "/usr/local/cuda/compat/lib"), (f"{theirs}/", "")):
        assert run_sourced('echo "$LD_LIBRARY_PATH"', LD_LIBRARY_PATH=path) == f"{kept}\n"
    assert run_sourced('echo "$LD_LIBRARY_PATH"', LD_LIBRARY_PATH="/a b:/c") == "/a b:/c\n"


def test_there_are_as_many_threads_as_fast_cores(machine: FakeMachine) -> None:
    for core in range(20):
        fast = 1024 if core < 10 else 997  # the two clusters need not run at quite the same clock
        machine.write(f"sys/devices/system/cpu/cpu{core}/cpu_capacity", f"{fast if core % 10 >= 5 else 718}\n")
    assert environment()["OMP_NUM_THREADS"] == "10"
    assert environment(OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"


def test_the_allocator_s_older_variable_has_its_say(machine: FakeMachine) -> None:
    assert "PYTORCH_ALLOC_CONF" not in environment(PYTORCH_CUDA_ALLOC_CONF="backend:native")


def test_nccl_is_told_of_ports_that_are_up_and_have_an_address(machine: FakeMachine) -> None:
    machine.command("ip", 'case "$*" in *enp1s0f0np0* | *enP2p1s0f0np0*) echo "2: inet 192.168.100.1/24" ;; esac')
    for device, interface, state in (
        ("rocep1s0f0", "enp1s0f0np0", "4: ACTIVE"),
        ("roceP2p1s0f0", "enP2p1s0f0np0", "4: ACTIVE"),
        ("rocep1s0f1", "enp1s0f1np1", "1: DOWN"),
        ("mlx5_9", "ib9", "4: ACTIVE"),  # without an address
    ):
        for name, text in (("link_layer", "Ethernet"), ("state", state), ("gid_attrs/ndevs/0", interface)):
            machine.write(f"sys/class/infiniband/{device}/ports/1/{name}", f"{text}\n")
    found = environment()
    assert set(found["NCCL_IB_HCA"].removeprefix("=").split(",")) == {"rocep1s0f0", "roceP2p1s0f0"}
    assert set(found["NCCL_SOCKET_IFNAME"].removeprefix("=").split(",")) == {"enp1s0f0np0", "enP2p1s0f0np0"}
    assert found["NANOCHAT_FOUND"] == "NCCL_IB_HCA,NCCL_SOCKET_IFNAME"
    assert environment(NCCL_IB_HCA="mine")["NCCL_IB_HCA"] == "mine"


def test_a_run_holds_the_machine_awake_and_lets_go_of_it(machine: FakeMachine) -> None:
    """The stand-in does as systemd-inhibit does: it runs the command that it is given."""
    (machine.root / "run/systemd/system").mkdir(parents=True)
    ended = machine.root / "ended"
    machine.command("systemd-inhibit", f'while [[ "$1" == --* ]]; do shift; done; "$@"; touch "{ended}"')
    run_sourced("stay_awake; sleep 0.5")
    (call,) = [call for call in machine.calls if call.startswith("systemd-inhibit")]
    assert "--what=sleep" in call
    until = time.monotonic() + 20
    while not ended.exists() and time.monotonic() < until:  # tail looks once a second
        time.sleep(0.05)
    assert ended.exists()


def test_a_machine_may_be_let_to_sleep(machine: FakeMachine) -> None:
    (machine.root / "run/systemd/system").mkdir(parents=True)
    machine.command("systemd-inhibit")
    run_sourced("stay_awake", NANOCHAT_STAY_AWAKE="0")
    assert machine.calls == []


def test_a_doctor_that_breaks_stops_no_run(machine: FakeMachine) -> None:
    machine.command("python", "echo 'warning memory little'; exit 1")
    assert run_sourced("look_around; echo continues") == "continues\n"
