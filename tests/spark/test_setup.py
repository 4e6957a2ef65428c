"""Set-up on a machine with a GPU, played with stand-ins that record what was called."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machine import GB10, FakeMachine

ROOT = Path(__file__).resolve().parent.parent.parent
UBUNTU = 'ID=ubuntu\nVERSION_ID="24.04"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n'


@pytest.fixture
def spark(machine: FakeMachine) -> FakeMachine:
    """A DGX Spark: Ubuntu 24.04 on aarch64."""
    machine.write("etc/os-release", UBUNTU)
    machine.command("uname", "echo aarch64")
    gpu(machine, GB10, "12.1")
    for name in ("apt-get", "dpkg", "curl", "sudo"):
        machine.command(name)
    return machine


def gpu(machine: FakeMachine, line: str, compute_cap: str) -> None:
    name, _, driver = line.split(", ")[:3]
    machine.command(
        "nvidia-smi",
        f'case "$*" in -L) echo "GPU 0: {name}" ;; *compute_cap*) echo {compute_cap} ;;'
        f' *driver_version*) echo {driver} ;; *) echo "{name}" ;; esac',
    )


def set_up_system(
    machine: FakeMachine, *, python: str = "", dry_run: bool = False, sudo: bool = True, is_root: bool = True
) -> str:
    """The part of set-up that asks the system for something; what it prints."""
    script = (
        f'source "{ROOT}/scripts/system.sh"; is_root() {{ {str(is_root).lower()}; }};'
        f'set_up_system "{python}" {str(dry_run).lower()} {str(sudo).lower()}'
    )
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def without_headers(machine: FakeMachine) -> None:
    """The system's Python lacks the venv module and its headers. The path is the system's, as readlink shows it."""
    machine.command("python3", 'case "$2" in *version_info*) echo 3.12 ;; *) exit 1 ;; esac')
    machine.command("readlink", "echo /usr/bin/python3.12")


INSTALL = "apt-get install --yes python3.12-venv python3.12-dev"


def changes(machine: FakeMachine) -> list[str]:
    """The calls that change the machine."""
    return [
        call for call in machine.calls if call.startswith(("apt-get", "curl", "dpkg --install", "dpkg --conf", "sudo"))
    ]


def test_a_spark_with_a_compiler_needs_nothing_from_root(spark: FakeMachine) -> None:
    spark.command("cc")
    said = set_up_system(spark)
    assert "found Ubuntu 24.04.3 LTS on aarch64, NVIDIA GB10, driver 580.95.05" in said and "root" not in said
    assert changes(spark) == []


def test_an_installation_that_was_interrupted_is_finished_first(spark: FakeMachine) -> None:
    spark.command("dpkg", 'case "$*" in --audit) echo "The following packages are only half configured" ;; esac')
    set_up_system(spark)
    assert changes(spark)[0] == "dpkg --configure -a"


def test_dry_run_prints_each_command_with_its_reason_and_runs_none(spark: FakeMachine) -> None:
    without_headers(spark)
    said = set_up_system(spark, python="python3", dry_run=True)
    assert changes(spark) == []
    lines = [line.strip() for line in said.splitlines()]
    commands = [i for i, line in enumerate(lines) if line.startswith("apt-get")]
    assert len(commands) == 2
    assert all(lines[i - 1].startswith("# ") for i in commands)


@pytest.mark.parametrize("sudo", [False, True])
def test_without_root_the_commands_are_printed_and_set_up_goes_on(spark: FakeMachine, sudo: bool) -> None:
    without_headers(spark)
    spark.command("sudo", "exit 1")  # it would have to ask, and nobody is there
    said = set_up_system(spark, python="python3", sudo=sudo, is_root=False)
    assert f"  {INSTALL}\n" in said
    assert [call for call in changes(spark) if call != "sudo --non-interactive true"] == []


def test_sudo_is_asked_once_for_everything(spark: FakeMachine) -> None:
    without_headers(spark)
    spark.command("sudo", '[ "$1" = --non-interactive ] || "$@"')
    set_up_system(spark, python="python3", is_root=False)
    first, once, *rest = changes(spark)
    assert first == "sudo --non-interactive true" and once.startswith("sudo bash -c ")
    assert rest[-1] == INSTALL
    assert sum(call.startswith("sudo bash") for call in spark.calls) == 1


def test_what_fails_as_root_does_not_end_set_up(spark: FakeMachine) -> None:
    without_headers(spark)
    spark.command("apt-get", "exit 100")
    set_up_system(spark, python="python3")
    assert changes(spark) == ["apt-get update"]


def test_python_s_headers_and_the_venv_module_come_with_the_system_s_python(spark: FakeMachine) -> None:
    without_headers(spark)
    set_up_system(spark, python="python3")
    assert changes(spark) == ["apt-get update", INSTALL]


def test_set_up_without_a_gpu_asks_the_system_for_nothing(machine: FakeMachine, tmp_path: Path) -> None:
    machine.command("nvidia-smi", "exit 9")
    for name in ("apt-get", "dpkg", "curl", "sudo"):
        machine.command(name)
    clone = tmp_path / "a clone"
    (clone / "scripts").mkdir(parents=True)
    for path in (*ROOT.glob("*.sh"), ROOT / "pyproject.toml", ROOT / "constraints.txt"):
        shutil.copy(path, clone)
    for path in ROOT.glob("scripts/*.sh"):
        shutil.copy(path, clone / "scripts")
    result = subprocess.run([clone / "setup.sh", "--dry-run"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "-m venv --clear" in result.stdout and "--constraint constraints.txt torch" in result.stdout
    assert changes(machine) == [] and not (clone / ".venv").exists()
