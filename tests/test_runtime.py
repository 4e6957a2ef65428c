"""Device, dtype and peak of the machine."""

import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from nanochat import runtime
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.runtime import Runtime, measure_matmul_flops, native_dtype, peak_memory_bytes


def test_a_device_that_is_not_there_gets_a_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=r"--device-type.*cpu.*cuda"):
        Runtime.start("cuda")


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype"),
    [
        ("GenuineIntel", "avx2", torch.float32),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", torch.float32),
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16", torch.bfloat16),
        ("AuthenticAMD", "avx2", torch.float32),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", torch.bfloat16),
        ("", "", torch.float32),  # ARM
    ],
)
def test_bfloat16_only_on_cpus_where_it_is_faster(
    vendor: str, flags: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_cpuinfo", {"vendor_id": vendor, "flags": flags}.__getitem__)
    assert native_dtype(torch.device("cpu")) == dtype


def test_the_assumed_peak_says_where_it_is_from() -> None:
    with Runtime.start("cpu") as here:
        flops, origin = here.peak_flops()
    assert 1e9 < flops < 1e15 and origin == "measured matmul"


def test_a_slow_cpu_is_measured_with_a_narrow_product() -> None:
    clock = itertools.count(0.0, 1.0)  # each product takes one second
    assert measure_matmul_flops(torch.device("cpu"), torch.float32, lambda: next(clock)) == 2 * 256**3


def test_peak_memory_is_that_of_this_process() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 64 * 2**30


@pytest.mark.parametrize(("capability", "has_fp8"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 1), True)])
def test_which_gpus_have_fp8(capability: tuple[int, int], has_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Runtime(torch.device("cuda", 0), torch.bfloat16, World()).has_fp8 == has_fp8
    assert not Runtime(torch.device("cpu"), torch.bfloat16, World()).has_fp8


def test_compile_pays_off_in_long_runs_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = (Runtime(torch.device(name), torch.bfloat16, World()) for name in ("cpu", "cuda"))
    monkeypatch.setattr(Runtime, "can_compile", lambda self: True)
    assert gpu.compile_pays_off(1.0) and not cpu.compile_pays_off(1e9) and cpu.compile_pays_off(1e10)
    monkeypatch.setattr(Runtime, "can_compile", lambda self: False)
    assert not gpu.compile_pays_off(1e10) and not cpu.compile_pays_off(1e10)


def test_a_path_with_a_space_cannot_be_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = (Runtime(torch.device(name), torch.bfloat16, World()) for name in ("cpu", "cuda"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(torch, "__file__", "/home/ada/my project/.venv/torch/__init__.py")
    assert cpu.unquoted_path() == "/home/ada/my project/.venv/torch" and gpu.unquoted_path() is None
    monkeypatch.setattr(torch, "__file__", "/home/ada/project/.venv/torch/__init__.py")
    assert cpu.unquoted_path() is None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/data of ada/inductor")
    assert cpu.unquoted_path() == "/data of ada/inductor"


def test_a_cpu_can_compile_with_a_cpp_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    here = Runtime(torch.device("cpu"), torch.float32, World())
    (tmp_path / "g++").touch(mode=0o755)
    assert not here.can_compile()  # without Python's headers
    (tmp_path / "Python.h").touch()
    assert here.can_compile()
    (tmp_path / "g++").unlink()
    assert not here.can_compile()


def test_false_warnings_about_a_gb10_are_hidden() -> None:
    code = """
import logging, warnings, nanochat
warnings.warn("Found GPU0 NVIDIA GB10 which is of compute capability (CC) 12.1.\\nIt is not supported.")
logging.getLogger("torch._inductor.utils").warning("Not enough SMs to use max_autotune_gemm mode")
logging.getLogger("torch._inductor.utils").warning("another warning")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "another warning\n"
