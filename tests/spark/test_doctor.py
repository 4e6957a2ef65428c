"""The checks of the doctor, on fake machines."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from nanochat import host
from nanochat.runtime import datasheet
from nanochat.spark import gpu, system
from nanochat.spark.system import Check, print_checks, run_checks
from scripts import doctor
from tests.machine import GB10, FakeMachine

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def spark(machine: FakeMachine, base_dir: Path) -> FakeMachine:
    """A DGX Spark with a desktop that may suspend it."""
    machine.gpu(GB10)
    (machine.root / "run/systemd/system").mkdir(parents=True)
    machine.command("systemctl", "echo graphical.target")
    machine.command("systemd-inhibit", "exit 1")
    return machine


def found(name: str) -> Check:
    return {check.name: check for check in system.quick_checks()}[name]


def test_a_healthy_spark(spark: FakeMachine) -> None:
    assert found("GPU") == Check("GPU", "ok", "NVIDIA GB10 (sm_121), driver 580.95.05")
    assert found("clocks").text == "2411 MHz, 88 W, 61 °C"
    assert found("disk").status == "ok"


def test_a_driver_too_old_for_cuda_13(spark: FakeMachine) -> None:
    spark.gpu(GB10.replace("580.95.05", "570.124.06"))
    check = found("GPU")
    assert check.status == "failed" and "too old for CUDA 13" in check.text and check.fix


def test_a_gpu_without_a_driver_is_detected(spark: FakeMachine) -> None:
    spark.command("nvidia-smi", "exit 9")
    assert found("GPU").status == "ok"
    spark.write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    spark.write("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")
    assert found("GPU").status == "failed"


def test_a_gpu_throttled_by_heat(spark: FakeMachine) -> None:
    spark.gpu(GB10[: GB10.rindex(",")] + ", 0x0000000000000040")
    check = found("clocks")
    assert check.status == "warning" and "too hot" in check.fix


def test_a_page_cache_that_the_gpu_may_not_get(spark: FakeMachine) -> None:
    assert found("memory").status == "ok"  # 57 of 119 GiB
    meminfo = (spark.root / "proc/meminfo").read_text()
    spark.write("proc/meminfo", meminfo.replace("60000000", "80000000"))
    assert found("memory").status == "warning"
    assert "drop_caches" in found("memory").fix
    spark.command("nvidia-smi", "exit 9")
    assert found("memory").status == "ok"  # only on unified memory


def test_a_desktop_that_may_suspend_the_machine(spark: FakeMachine) -> None:
    assert (found("suspend").status, found("suspend").fix) == ("warning", system.MASK_SLEEP)
    spark.command("systemd-inhibit")
    assert found("suspend").status == "ok" and "during a run" in found("suspend").text
    spark.command("systemd-inhibit", "exit 1")
    target = spark.root / "etc/systemd/system/suspend.target"
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/null")
    assert found("suspend").text == "masked"


def test_a_server_without_a_desktop_stays_awake(spark: FakeMachine) -> None:
    spark.command("systemctl", "echo multi-user.target")
    assert found("suspend").status == "ok"
    spark.write("etc/systemd/logind.conf", "[Login]\nIdleAction=suspend\n")
    assert found("suspend").status == "warning"


def test_the_ptxas_that_comes_with_triton(spark: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = host.gpus()
    for chips, status in (("sm_120 sm_121", "ok"), ("sm_100", "warning")):
        spark.command("ptxas-mine", f"echo {chips}")
        monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(spark.bin / "ptxas-mine"))
        assert (check := system.ptxas(gpus)) and check.status == status
    assert system.ptxas([]) is None


def test_a_gpu_stuck_in_low_power(spark: FakeMachine) -> None:
    spark.gpu(GB10.replace("2411, 88.5", "799, 19.5"))
    check = found("clocks")
    assert check.status == "warning" and "low power" in check.text and "unplug" in check.fix
    spark.gpu(GB10.replace("2411, 88.5, 3003, 97", "208, 4.5, 3003, 0"))
    assert found("clocks").status == "ok"  # idle


def test_old_firmware(spark: FakeMachine) -> None:
    assert "firmware" not in {check.name for check in system.quick_checks()}
    spark.gpu(GB10.replace("9A.0B.25", "9A.0B.1E"))
    assert found("firmware").status == "warning" and "fwupdmgr" in found("firmware").fix


def test_swap_in_use(spark: FakeMachine) -> None:
    assert (check := system.swap()) and check.status == "ok"
    spark.write("proc/meminfo", "MemTotal: 8 kB\nMemAvailable: 4 kB\nSwapTotal: 16000000 kB\nSwapFree: 2000000 kB\n")
    assert (check := system.swap()) and check.status == "warning" and "13.4 GiB of 15.3 GiB" in check.text


def test_a_disk_too_small_for_the_depth_planned(base_dir: Path) -> None:
    assert system.disk(1e18, "depth 32").status == "warning"
    assert system.disk(1e3, "depth 2").status == "ok"


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    check = system.network()
    assert check.status == "warning" and check.fix == "curl -I http://127.0.0.1:9"


def test_a_clock_that_is_not_synchronized(machine: FakeMachine) -> None:
    machine.command("timedatectl", "echo no")
    assert system.clock().status == "warning"


@pytest.mark.parametrize(("measured", "status"), [(90, "ok"), (40, "warning")])
def test_a_speed_is_compared_with_the_datasheet(measured: float, status: str) -> None:
    assert datasheet("NVIDIA GB10") == (125, 273)
    assert datasheet("NVIDIA RTX A1000") is None
    assert datasheet("NVIDIA A100-SXM4-80GB") == (312, 1935)
    check = gpu.compare("matmul bf16", measured, "TFLOP/s", 125)
    assert check.status == status and f"{measured / 125:.0%} of the datasheet's 125" in check.text


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "failed", "no kernels"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), "warning", "other programs"),
    ],
)
def test_missing_kernels_and_memory_are_reported_with_a_fix(error: Exception, status: str, words: str) -> None:
    def fails() -> Check:
        raise error

    check = gpu.explain_errors("matmul bf16", fails)
    assert check.status == status and words in check.text
    assert check.fix == (gpu.REINSTALL if status == "failed" else "nvidia-smi    # lists them")


@pytest.mark.gpu
def test_the_gpu_s_kernels_run() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    checks = (gpu.build, gpu.matmul, gpu.copy, gpu.attention, gpu.triton_kernel)
    assert [check.text for check in (check() for check in checks) if check.status == "failed"] == []


def test_an_exception_in_a_check_becomes_a_warning() -> None:
    (check,) = run_checks({"disk": lambda: system.swap() and 1 / 0})  # type: ignore[dict-item,return-value]  # broken on purpose
    assert (check.name, check.status) == ("disk", "warning") and "ZeroDivisionError" in check.text


def test_lines_fit_the_screen_and_commands_stay_whole() -> None:
    out = io.StringIO()
    command = "nvidia-smi -q -d PERFORMANCE,POWER    # " + "and look " * 10
    print_checks(Console(file=out, width=80), [Check("memory", "warning", "word " * 40, command)])
    *text, fix = out.getvalue().splitlines()
    assert max(map(len, text)) <= 80 and text[0].startswith("warning memory ")
    assert fix.strip() == command.strip()


def test_json_is_one_object(
    spark: FakeMachine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spark.command("nvidia-smi", "exit 9")
    doctor.main(doctor.DoctorOptions(fast=True, json=True))
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks] == ["suspend"]  # --fast prints only problems
    assert checks[0].keys() == {"name", "status", "text", "fix"}


def test_the_quick_checks_are_fast_and_do_not_load_torch(spark: FakeMachine) -> None:
    script = "import sys; sys.argv[1:] = ['--fast']\nfrom scripts import doctor\n"
    script += "doctor.cli.run(doctor.main, doctor.DoctorOptions)\nprint('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 5  # 0.25 s on two cores that do nothing else
    assert result.stdout.splitlines()[-1] == "False"
