"""One of two processes is killed, stopped or fails: both end with a message that names it, and the run resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
FAULTS = {
    "none": "pass",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "failing": "raise RuntimeError('broken')",
}
STAGE = """
import os, signal, sys, threading
from dataclasses import replace
import torch
from nanochat import cli, paths
from nanochat.train import watchdog
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import FewRows, OPTIONS, batches, begin, HOW

torch.set_num_threads(1)
watchdog.SILENCE_SECONDS = 3.0
watchdog.GRACE_SECONDS = 2.0

class Rows(FewRows):
    def __getitem__(self, index):
        if os.environ["RANK"] == "1" and run.step == 5:
            INPUT_FAULT
        return super().__getitem__(index)

def main(options):
    global run
    with Runtime.start("cpu") as runtime:
        run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), options)
        loss = run.model.loss

        def faulty_loss(*args):
            if runtime.world.rank == 1 and run.step == 5:
                LOSS_FAULT
            return loss(*args)

        run.model.loss = faulty_loss
        train(run, batches(Rows(), options, runtime.world), 8, **HOW)

cli.run(main, type(OPTIONS), args=["--model-tag", sys.argv[1], "--save-every", "2", "--device-batch-size", "4",
                                   "--device-type", "cpu", "--tracker", "none"])
"""


def run_two(folder: Path, fault: str, tag: str) -> "subprocess.CompletedProcess[str]":
    fault, _, place = fault.partition(" in ")
    in_input, in_loss = ("pass", FAULTS[fault]) if place == "loss" else (FAULTS[fault], "pass")
    (folder / "stage.py").write_text(STAGE.replace("INPUT_FAULT", in_input).replace("LOSS_FAULT", in_loss))
    return subprocess.run(
        [sys.executable, "-m", "scripts.launch", "2", "stage", tag],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def losses(tag: str) -> list[float]:
    return [row["loss"] for row in read_steps(paths.checkpoints_dir("base") / tag / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("killed", "killed"),
        ("killed in loss", "killed"),
        ("stopped", "3 s"),
        ("failing", "error"),
    ],
)
def test_both_end_and_the_one_is_named(base_dir: Path, tokenizer: Tokenizer, fault: str, sentence: str) -> None:
    tokenizer.save(paths.tokenizer_dir())
    result = run_two(base_dir, fault, "test")
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert any("process 1" in line and sentence in line for line in said.splitlines()), said
    assert "Connection closed by peer" not in said
    if fault == "killed":
        assert run_two(base_dir, "none", "test").returncode == 0
        assert run_two(base_dir, "none", "never-stopped").returncode == 0
        assert losses("test") == losses("never-stopped") and len(losses("test")) == 8
