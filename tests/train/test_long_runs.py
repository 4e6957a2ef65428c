"""Events in runs of several days: signals, a full disk, a second run, a damaged checkpoint."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.batches import StepData
from nanochat.data.token_writer import write_documents
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.telemetry import run_log
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import MODEL_FILE, OPTIMIZER_FILE
from nanochat.train.loop import train
from nanochat.train.run import Evaluation
from tests.training import HOW, OPTIONS, Eventful, FewRows, batches, begin, flip_a_byte, losses, steps_saved

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def runtime(base_dir: Path) -> Iterator[Runtime]:
    with Runtime.start("cpu") as runtime:
        yield runtime


@pytest.fixture
def small_base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A base directory on a disk of 20 MB, which holds four checkpoints of the test's model."""
    base = tmp_path / "disk"
    base.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(base)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    yield base
    subprocess.run(["umount", "--lazy", base], check=True)


def fill(disk: Path) -> None:
    while steps_saved("test") != [2]:  # it is written in the background
        time.sleep(0.001)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(OPTIONS, save_every=2, keep_last=9)
    straight = begin(runtime, tokenizer, replace(options, model_tag="straight"))
    train(straight, batches(FewRows()), 8, **HOW)
    train(begin(runtime, tokenizer, options), batches(FewRows()), 6, **HOW)
    folder = paths.checkpoints_dir("base") / "test"
    flip_a_byte(folder / "step_000006" / OPTIMIZER_FILE)
    (folder / "step_000004" / "meta.json").write_text("")
    resumed = begin(runtime, tokenizer, options)
    out = capsys.readouterr().out
    assert f"{folder}/step_000006 is damaged ({OPTIMIZER_FILE}" in out
    assert f"{folder}/step_000004 is damaged (meta.json" in out
    assert (folder / "log.txt").read_text().count("is damaged") == 2
    assert resumed.step == 2
    train(resumed, batches(FewRows()), 8, **HOW)
    assert losses(resumed) == losses(straight) and steps_saved("test") == [2, 4, 6, 8]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_over(
    runtime: Runtime, tokenizer: Tokenizer
) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 1, **HOW)
    folder = paths.checkpoints_dir("base") / "test" / "step_000001"
    flip_a_byte(folder / MODEL_FILE)
    with pytest.raises(UserError, match="step_000001"):
        begin(runtime, tokenizer)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="checkpoint"):
        begin(runtime, tokenizer)
    assert begin(runtime, tokenizer, replace(OPTIONS, fresh=True)).step == 0


def test_sigusr1_saves_and_the_run_goes_on(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(runtime, tokenizer, replace(OPTIONS, keep_last=9))
    train(run, Eventful({3: lambda: signal.raise_signal(signal.SIGUSR1)}), 5, **HOW)
    assert steps_saved("test") == [3, 5] and "step 3" in capsys.readouterr().out


def test_the_start_of_a_run_says_how_to_follow_and_to_stop_it(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(runtime, tokenizer)
    train(run, batches(FewRows()), 1, **HOW)
    out = capsys.readouterr().out
    assert "./nanochat.sh watch" in out and str(run.folder / "log.txt") in out and f"kill -INT {os.getpid()}" in out
    log = (run.folder / "log.txt").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d base test 1/1  loss ", log, re.MULTILINE)


def test_on_a_full_disk_the_run_says_so_keeps_what_it_has_and_goes_on(
    small_base_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with Runtime.start("cpu") as runtime:
        straight = begin(runtime, tokenizer, replace(OPTIONS, model_tag="straight"))
        train(straight, batches(FewRows()), 8, **HOW)
        run = begin(runtime, tokenizer, replace(OPTIONS, save_every=2, keep_last=1))
        saved_at_fault: list[int] = []

        def room_again() -> None:
            saved_at_fault.extend(steps_saved("test"))
            (small_base_dir / "ballast").unlink()

        train(run, Eventful({4: lambda: fill(small_base_dir), 6: room_again}), 8, **HOW)
    out = capsys.readouterr().out
    assert "step 4" in out and "No space left on device" in out
    assert saved_at_fault == [2] and steps_saved("test") == [8]
    assert losses(run) == losses(straight)  # no line is missing of those that waited for room


def test_a_last_save_that_fails_ends_the_run_with_a_sentence(small_base_dir: Path, tokenizer: Tokenizer) -> None:
    options = replace(OPTIONS, save_every=2)
    with Runtime.start("cpu") as runtime:
        with pytest.raises(UserError, match=r"step 3.*No space left"):
            train(begin(runtime, tokenizer, options), Eventful({3: lambda: fill(small_base_dir)}), 3, **HOW)
        assert steps_saved("test") == [2]
        (small_base_dir / "ballast").unlink()
        resumed = begin(runtime, tokenizer, options)
        train(resumed, batches(FewRows()), 3, **HOW)
    assert steps_saved("test") == [2, 3] and len(losses(resumed)) == 3


def test_steps_left_out_are_counted(runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    class BadSteps:
        def step_data(self, step: int) -> StepData:
            data = batches(FewRows()).step_data(step)
            weight = {1: math.nan, 3: math.inf}.get(step, 1.0)
            return StepData([b._replace(weights=torch.full(b.targets.shape, weight)) for b in data.batches], {})

    run = begin(runtime, tokenizer, replace(OPTIONS, save_every=2))
    train(run, BadSteps(), 5, **HOW)
    rows = read_steps(run.folder / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2]
    assert rows[1]["loss"] is None and rows[2]["loss"] is not None
    assert "5 steps (2 skipped)" in capsys.readouterr().out
    assert begin(runtime, tokenizer).skipped_steps == 2


class BadFrom:
    """Batches whose loss is not finite from some step on, and in one of which something happens."""

    def __init__(self, bad: range, event: tuple[int, Callable[[], object]] = (0, lambda: None)) -> None:
        self.bad, self.event = bad, event

    def step_data(self, step: int) -> StepData:
        if step + 1 == self.event[0]:
            self.event[1]()
        data = batches(FewRows()).step_data(step)
        weight = math.nan if step + 1 in self.bad else 1.0
        return StepData([b._replace(weights=torch.full(b.targets.shape, weight)) for b in data.batches], {})


def test_weights_that_may_be_bad_are_not_saved_and_prune_nothing(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(OPTIONS, save_every=1, keep_last=1)
    with pytest.raises(KeyboardInterrupt):
        train(
            begin(runtime, tokenizer, options),
            BadFrom(range(3, 99), (5, lambda: signal.raise_signal(signal.SIGTERM))),
            9,
            **HOW,
        )
    assert steps_saved("test") == [2] and "step 5" in capsys.readouterr().out
    with pytest.raises(UserError, match="finite"):
        train(begin(runtime, tokenizer, options), BadFrom(range(4, 5)), 4, **HOW)
    assert steps_saved("test") == [3]
    train(begin(runtime, tokenizer, replace(options, save_every=4)), BadFrom(range(4, 6)), 7, **HOW)
    assert steps_saved("test") == [7]


def test_a_save_that_was_due_at_a_bad_step_comes_after_the_next_good_one(
    runtime: Runtime, tokenizer: Tokenizer
) -> None:
    train(begin(runtime, tokenizer, replace(OPTIONS, save_every=4, keep_last=9)), BadFrom(range(4, 6)), 7, **HOW)
    assert steps_saved("test") == [6, 7]


def test_a_stop_saves_before_anything_else(runtime: Runtime, tokenizer: Tokenizer) -> None:
    def never() -> Any:
        raise AssertionError("a stop was asked for")

    how = {**HOW, "samples": never, "evaluation": Evaluation(2, lambda _: never())}
    with pytest.raises(KeyboardInterrupt):
        train(
            begin(runtime, tokenizer, replace(OPTIONS, sample_every=2)),
            Eventful({2: lambda: signal.raise_signal(signal.SIGTERM)}),
            9,
            **how,
        )
    assert steps_saved("test") == [2]


EVALUATING = """
import signal, sys
from nanochat import cli, paths
from nanochat.data.batches import StreamRows
from nanochat.data.token_files import TokenFile
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.run import Evaluation
from nanochat.train.loop import train
from tests.training import HOW, OPTIONS, SEQUENCE_LEN, FewRows, batches, begin

class Held(StreamRows):
    count = 0

    def __getitem__(self, index):
        self.count += 1
        if index == 41 and run.step == int(sys.argv[1]):
            signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(index)

def main(options):
    global run
    with Runtime.start("cpu") as runtime:
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        run = begin(runtime, tokenizer, OPTIONS)

        def measure(leave_if_asked):
            rows = Held(TokenFile.open(paths.base_dir(), "val", tokenizer), SEQUENCE_LEN, tokenizer.bos_id)
            assert len(rows) > 401
            try:
                tokens = 401 * SEQUENCE_LEN
                return {"bpb": bits_per_byte(run.model, tokenizer, rows, 4, tokens, runtime, leave_if_asked)}
            finally:
                sys.stderr.write(f"{run.step}:{rows.count}\\n")

        train(run, batches(FewRows(), world=runtime.world), 5, **HOW, evaluation=Evaluation(2, measure))

cli.run(main, type(OPTIONS), args=[])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_leaves_an_evaluation_in_all_processes_and_the_last_one_is_made_by_the_same_command(
    base_dir: Path, tokenizer: Tokenizer, processes: int
) -> None:
    """Row 41 of 401, of one process, is where it is asked for; the other process has one row less."""
    tokenizer.save(paths.tokenizer_dir())
    write_documents(base_dir, "val", tokenizer, demo_data.documents("train")[:80], "text")
    (base_dir / "evaluating.py").write_text(EVALUATING)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{base_dir}", "OMP_NUM_THREADS": "1"}
    launcher = ["scripts.launch", str(processes)] if processes > 1 else []

    def run(asked_at_step: int) -> tuple[int, list[str]]:
        """The exit code, and the rows that each process has evaluated, as step:rows."""
        command = [sys.executable, "-m", *launcher, "evaluating", str(asked_at_step)]
        ended = subprocess.run(
            command, cwd=base_dir, env=environment, timeout=100, capture_output=True, text=True, check=False
        )
        assert ended.returncode in (0, 130), ended.stderr
        return ended.returncode, sorted(re.findall(r"\d:\d+", ended.stderr))

    def evaluated() -> list[int]:
        rows = read_steps(paths.checkpoints_dir("base") / "test" / "metrics.jsonl")
        return [row["step"] for row in rows if "bpb" in row]

    assert run(asked_at_step=2) == (130, ["2:44"] if processes == 1 else ["2:24", "2:24"])
    assert steps_saved("test") == [2] and evaluated() == []
    last = {1: ["401"], 2: ["200", "201"]}[processes]
    left = {1: ["5:44"], 2: ["5:24", "5:24"]}[processes]
    assert run(asked_at_step=5) == (130, [*(f"4:{rows}" for rows in last), *left])
    assert steps_saved("test") == [2, 5] and evaluated() == [4]
    assert run(asked_at_step=6) == (0, [f"5:{rows}" for rows in last])
    assert steps_saved("test") == [2, 5] and evaluated() == [4, 5]


def test_a_run_that_ends_in_its_last_evaluation_loses_no_step(runtime: Runtime, tokenizer: Tokenizer) -> None:
    def killed(_: object) -> dict[str, float]:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(begin(runtime, tokenizer), batches(FewRows()), 3, **HOW, evaluation=Evaluation(0, killed))
    before = checkpoint.find("base")
    assert before.step == 3 and before.meta["results"] == {}
    again = begin(runtime, tokenizer)
    train(again, batches(FewRows()), 3, **HOW, evaluation=Evaluation(0, lambda _: {"bpb": 1.5}))
    after = checkpoint.find("base")
    assert after.step == 3 and after.meta["results"] == {"bpb": 1.5}
    assert after.meta["saved_at"] == before.meta["saved_at"]  # what grew from it, or was measured of it, stays its own
    rows = read_steps(again.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["bpb"] == 1.5 and rows[-1]["loss"] > 0
    train(begin(runtime, tokenizer), batches(FewRows()), 3, **HOW, evaluation=Evaluation(0, killed))  # not made again


def test_an_evaluation_or_samples_without_memory_cost_no_step(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    how = {**HOW, "samples": exhausted, "evaluation": Evaluation(0, lambda _: exhausted())}
    train(begin(runtime, tokenizer), batches(FewRows()), 2, **how)
    out = capsys.readouterr().out
    assert steps_saved("test") == [2] and "evaluation" in out and "samples" in out


def test_after_fresh_the_command_to_go_on_with_is_another(
    runtime: Runtime, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    train(begin(runtime, tokenizer, replace(OPTIONS, fresh=True)), batches(FewRows()), 1, **HOW)
    assert "without --fresh" in capsys.readouterr().out


def test_a_learning_rate_may_be_lowered_on_a_resume_and_not_raised(runtime: Runtime, tokenizer: Tokenizer) -> None:
    train(begin(runtime, tokenizer), batches(FewRows()), 1, **HOW)
    with pytest.raises(UserError, match=r"--matrix-lr.*0\.03"):
        begin(runtime, tokenizer, replace(OPTIONS, matrix_lr=0.03))
    lower = replace(OPTIONS, matrix_lr=0.01)
    train(begin(runtime, tokenizer, lower), batches(FewRows()), 2, **HOW)
    with pytest.raises(UserError, match=r"--matrix-lr.*0\.01"):
        begin(runtime, tokenizer)


@pytest.mark.parametrize("tag", ["aside", "a/b", "../d4", ".hidden", "", "two words"])
def test_a_tag_that_is_no_name_of_a_folder_is_refused(runtime: Runtime, tokenizer: Tokenizer, tag: str) -> None:
    if tag:
        with pytest.raises(UserError, match="--model-tag"):
            begin(runtime, tokenizer, replace(OPTIONS, model_tag=tag))
    else:  # as if it had not been given
        assert begin(runtime, tokenizer, replace(OPTIONS, model_tag=tag)).tag == "d2"


HOLDER = (
    "import time; from nanochat import locks, paths; "
    "print(locks.hold(paths.run_lock('base', 'test')), flush=True); time.sleep(99)"
)


def test_a_second_run_of_a_model_is_refused_until_the_first_ends_however_that_comes(
    runtime: Runtime, tokenizer: Tokenizer
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "None\n"
        with pytest.raises(UserError, match=f"{other.pid}.*test"):
            begin(runtime, tokenizer)
        assert begin(runtime, tokenizer, replace(OPTIONS, model_tag="another")).step == 0
        other.kill()
        other.wait()
    assert begin(runtime, tokenizer).step == 0


def test_last_words_do_not_wait_for_a_display_that_is_held(
    runtime: Runtime, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "LAST_WORDS_SECONDS", 0.1)
    run = begin(runtime, tokenizer)
    with run_log.RunLog(run, 1, {}) as log:
        held = threading.Event()
        monkeypatch.setattr(log._display, "show", lambda text: held.wait())
        said = threading.Thread(target=log.last_words, args=("error: it is stuck",), daemon=True)
        said.start()
        said.join(20)
        assert not said.is_alive() and "stuck" in (run.folder / "log.txt").read_text()
        held.set()
