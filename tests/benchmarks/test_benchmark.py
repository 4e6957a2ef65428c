"""The file that nanochat.sh benchmark makes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import host
from nanochat.spark.gpu import hardware_checks
from scripts import benchmark

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_record_describes_the_machine_but_not_its_owner() -> None:
    facts = benchmark.machine_facts()
    assert facts.keys() >= {"name", "gpus", "cpu", "memory_bytes", "system", "python", "torch", "commit"}
    checks = [dataclasses.asdict(check) for check in hardware_checks(host.gpus())]
    assert {check["name"] for check in checks} >= {"GPU", "memory"}
    assert not {check["name"] for check in checks} & {"disk", "network", "logins", "time", "toolkit"}
    text = benchmark.anonymous(json.dumps([facts, checks, f"{Path.home()}/x"]))
    assert os.uname().nodename not in text and str(Path.home()) not in text


def test_measure_returns_command_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in.py").write_text(
        "import json, sys\nprint('warming up')\nprint(json.dumps({'argv': sys.argv[1:]}))\n"
    )
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = benchmark.measure("stand_in", "--depth", "12")
    assert done["figures"] == {"argv": ["--depth", "12", "--json"]}
    assert done["command"] == "python -m stand_in --depth 12 --json"
    assert benchmark.measure("broken")["error"] == "exit code 3 without figures"


@pytest.mark.parametrize("command", benchmark.ON_A_CPU + benchmark.ON_A_GPU + benchmark.WITH_FP8)
def test_every_benchmark_takes_the_arguments_it_is_given(command: str) -> None:
    module, *arguments = command.split()
    help_text = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(option in help_text for option in [*arguments, "--json"] if option.startswith("--"))
