"""The reader of a run's output may disconnect or stop reading; the run continues."""

import contextlib
import io
import os
import pty
import select
import sys
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from nanochat import paths
from nanochat.telemetry.console import LogFile, ProgressDisplay, Terminal
from nanochat.tokenizer import Tokenizer
from tests.training import ROOT, steps_saved

STAGE = """
import time
from dataclasses import replace
from nanochat import cli, paths
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import Eventful
from nanochat.train.loop import train
from tests.training import HOW, OPTIONS, begin

def wait_for_the_terminal_to_close():
    while not (paths.base_dir() / "closed").exists():
        time.sleep(0.01)

def main(options):
    with Runtime.start("cpu") as runtime:
        run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), OPTIONS)
        train(run, Eventful({3: wait_for_the_terminal_to_close}), 6, **HOW)
        print("printed by others")

cli.run(main, type(OPTIONS), args=[])
"""


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_who_stops_reading_without_a_word_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    with open(writer, "w") as stream, contextlib.closing(LogFile(tmp_path / "log.txt")) as log:
        monkeypatch.setattr(sys, "stdout", stream)
        terminal = Terminal(log)
        terminal.write("the first words\n")
        assert b"the first words" in os.read(reader, 100)
        writing = threading.Thread(target=lambda: [terminal.write("x" * 10_000) for _ in range(100)], daemon=True)
        writing.start()
        writing.join(20)
        assert not writing.is_alive() and not terminal.gone
        assert os.get_blocking(writer)  # others who write there do not get errors
        while select.select([reader], [], [], 0.1)[0]:
            os.read(reader, 1 << 16)
        terminal.write("the last words\n")
        assert b"the last words" in os.read(reader, 1 << 16)
    os.close(reader)


def test_control_characters_reach_neither_terminal_nor_log(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as screen, contextlib.closing(LogFile(tmp_path / "log.txt")) as log:
        ProgressDisplay("base d2", 9, 0, cast(io.TextIOBase, screen), log).print("sample: \x1b]0;title\x07 \x9b2J end")
    for file in ("screen", "log.txt"):
        text = (tmp_path / file).read_text()
        assert "end" in text and not set("\x1b\x07\x9b") & set(text)


def test_a_closed_terminal_does_not_stop_a_run(base_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(paths.tokenizer_dir())
    (base_dir / "stage.py").write_text(STAGE)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, str(base_dir / "stage.py")])
    shown = b""
    deadline = time.monotonic() + 100
    while b"2/6" not in shown:  # the bar, after two steps
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP, and whatever is written from now on fails
    (base_dir / "closed").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log = (paths.checkpoints_dir("base") / "test" / "log.txt").read_text()
    assert "base test: 6 steps in " in log and log.endswith("printed by others\n")
    assert steps_saved("test") == [6]
