"""Ctrl-C ends a run after its step, in one process and in several."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scripts
from nanochat.train.signals import SignalHandler

ROOT = Path(__file__).resolve().parent.parent.parent
# Stands for a stage: takes a step of the seconds given, again and again, and saves when it was asked to stop.
STAGE = """
import os, sys, time
from nanochat.train.signals import SignalHandler

def say(line):
    os.write(1, f"{line}\\n".encode())  # at once, or the lines of two processes could mix

with SignalHandler() as interruption:
    say("ready")
    while not interruption.stop:
        time.sleep(0.01)
        if interruption.take_save():
            say("saving")
    say("stopping")
    time.sleep(float(sys.argv[1]))
say("saved")
sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with SignalHandler() as interruption:
        os.kill(os.getpid(), number)
        assert interruption.stop
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_after_ctrl_c_interrupts_at_once(second: signal.Signals) -> None:
    with SignalHandler(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)


def test_a_supervisor_may_say_it_twice() -> None:
    with SignalHandler() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.stop


def test_sigusr1_asks_once_for_a_save_and_sighup_for_nothing() -> None:
    with SignalHandler() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.stop and not interruption.take_save()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not interruption.stop and interruption.take_save()
        assert not interruption.stop and not interruption.take_save()


def test_sigusr1_ends_no_run_that_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(sys, "argv", ["-m"])
    try:
        importlib.reload(scripts)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def two_processes(folder: Path, seconds_a_step: float) -> Iterator[subprocess.Popen[str]]:
    """Two of the stand-ins, ready, in a session of their own as in a terminal."""
    (folder / "stage.py").write_text(STAGE)
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.launch", "2", "stage", str(seconds_a_step)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as processes:
        try:
            expect(processes, "ready")
            yield processes
        finally:
            processes.kill()


def expect(processes: "subprocess.Popen[str]", line: str) -> None:
    """Wait until both have said this."""
    assert processes.stdout is not None
    assert [processes.stdout.readline() for _ in range(2)] == [f"{line}\n"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_processes_save_before_they_end(number: signal.Signals, tmp_path: Path) -> None:
    with two_processes(tmp_path, seconds_a_step=0.2) as processes:
        os.killpg(processes.pid, number)
        out, err = processes.communicate(timeout=60)
    assert (sorted(out.split()), err) == (["saved", "saved", "stopping", "stopping"], "")
    assert processes.returncode == 130


def test_a_second_ctrl_c_ends_both_processes_at_once(tmp_path: Path) -> None:
    with two_processes(tmp_path, seconds_a_step=100) as processes:
        os.killpg(processes.pid, signal.SIGINT)
        expect(processes, "stopping")
        os.killpg(processes.pid, signal.SIGINT)
        out, _ = processes.communicate(timeout=60)
    assert out == "" and processes.returncode == 130


def test_a_closed_terminal_stops_neither_and_sigusr1_to_the_launcher_reaches_both(tmp_path: Path) -> None:
    with two_processes(tmp_path, seconds_a_step=0.0) as processes:
        os.killpg(processes.pid, signal.SIGHUP)
        os.kill(processes.pid, signal.SIGUSR1)
        expect(processes, "saving")
        os.kill(processes.pid, signal.SIGTERM)
        out, err = processes.communicate(timeout=60)
    assert (sorted(out.split()), err) == (["saved", "saved", "stopping", "stopping"], "")
    assert processes.returncode == 130
