"""wandb and trackio: taken where they are wanted, and never a reason for a run to end."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.telemetry.trackers import Tracker
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import HOW, OPTIONS, FewRows, batches, begin, losses

# A tracker whose server is gone from some moment on.
OUT_OF_REACH = """
import os
from types import SimpleNamespace

def reach(what):
    if what == os.environ["GONE_AT"]:
        raise ConnectionError("no route\\nto host")
    with open(os.environ["ARRIVED"], "a") as file:
        file.write(f"{what} ")

def init(name, **options):
    reach("init")
    return SimpleNamespace(name=name or "made-up")

def log(metrics, step):
    reach(str(step))

def finish():
    reach("finish")
"""


@pytest.fixture
def out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the module trackio; the file contains the calls that reached it."""
    (tmp_path / "trackio.py").write_text(OUT_OF_REACH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ARRIVED", str(tmp_path / "arrived"))
    installed = sys.modules.pop("trackio", None)
    yield tmp_path / "arrived"
    del sys.modules["trackio"]
    if installed:
        sys.modules["trackio"] = installed


@pytest.mark.parametrize(
    ("gone_at", "arrived", "failure"),
    [
        ("init", "", "start"),
        ("3", "init 1 2 ", "logging"),
        ("finish", "init 1 2 3 4 ", "finish"),
        ("never", "init 1 2 3 4 finish ", ""),
    ],
)
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    gone_at: str,
    arrived: str,
    failure: str,
    out_of_reach: Path,
    base_dir: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GONE_AT", gone_at)
    with Runtime.start("cpu") as runtime:
        run = begin(runtime, tokenizer, replace(OPTIONS, tracker="trackio"))
        train(run, batches(FewRows()), 4, **HOW)
    assert run.step == 4 and len(losses(run)) == 4
    assert run.tracker_id == (None if gone_at == "init" else "made-up")
    assert (out_of_reach.read_text() if out_of_reach.exists() else "") == arrived
    warnings = [line for line in capsys.readouterr().out.splitlines() if "trackio" in line]
    assert len(warnings) == bool(failure)
    assert all(failure in warning and "no route to host" in warning for warning in warnings)
    assert all(warning in (run.folder / "log.txt").read_text() for warning in warnings)


def test_no_tracker_without_a_login_or_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = Tracker("auto", None, None, print)
    tracker.start("project", {})
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert tracker.run_id is None


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        Tracker("trackio", "run", None, print)


def test_wandb_out_of_reach_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    wandb.teardown()  # settings are read once in a process
    failures: list[str] = []
    tracker = Tracker("wandb", "run", "before", failures.append)
    tracker.start("project", {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    wandb.teardown()  # ends its service process
    (failure,) = failures
    assert "wandb failed to start" in failure and "\n" not in failure
    assert tracker.run_id == "before"
