"""Whether a run that is killed again and again ends as the run that was never stopped.

python -m benchmarks.kill_test --kills 50
"""

import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from nanochat import cli, paths
from nanochat.data import batches
from nanochat.runtime import cpu_name, software
from nanochat.telemetry.run_log import METRICS_FILE, read_steps
from nanochat.train import checkpoint
from nanochat.train.checkpoint import MODEL_FILE
from nanochat.train.options import check_range
from scripts import base_train, prepare

SEQUENCE_LEN = 64
LONGEST_WAIT_SECONDS = 60.0
PHASES = ("starting", "training", "saving")
Phase = Literal["starting", "training", "saving"]


@dataclass
class KillTestOptions:
    """Train a small model on the demo's text twice, once killed with SIGKILL at random moments, and compare."""

    kills: int = 50
    """in turn while the run starts, trains and saves; at a random moment of each"""
    num_iterations: int = 1000
    """steps of each run; every fourth is saved"""
    seed: int = 1
    """of the moments"""

    def __post_init__(self) -> None:
        check_range("kills", self.kills, 0)
        check_range("num_iterations", self.num_iterations, 1)


@dataclass
class Findings:
    """What is counted over all the restarts."""

    kills: Counter[Phase] = field(default_factory=Counter)
    half_written: int = 0
    """kills that left a checkpoint half written"""
    bad_checkpoints: int = 0
    """restarts from a checkpoint whose files were not as they were written"""
    older_checkpoints: int = 0
    """restarts from another checkpoint than the newest sound one"""


def train(tag: str, num_iterations: int, rows_file: str) -> None:
    """One start of the run, in a process of its own, with the rows of each step written down as it begins."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends

    class Recorded(batches.RowBatches):
        def row_indices(self, step: int) -> list[int]:
            rows = super().row_indices(step)
            with open(rows_file, "a") as file:
                file.write(json.dumps([step, rows]) + "\n")
            return rows

    batches.RowBatches = Recorded  # type: ignore[misc]  # the stage itself, with a record of what it reads
    base_train.main(
        replace(
            base_train.DEMO,
            depth=2,
            model_tag=tag,
            max_seq_len=SEQUENCE_LEN,
            device_batch_size=8,
            total_batch_size=8 * SEQUENCE_LEN,
            short_rows_ratio=0.0,
            num_iterations=num_iterations,
            save_every=4,
            sample_every=0,
            eval_every=100,
            tracker="none",
        )
    )


def main(options: KillTestOptions) -> None:
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        with contextlib.redirect_stdout(None):
            prepare.main(prepare.DEMO)
        start = Starter(options.num_iterations)
        never_stopped = start("never-stopped")
        never_stopped.join()
        findings = Findings()
        rng = random.Random(options.seed)
        for kill in range(options.kills):
            kill_once(start, PHASES[kill % len(PHASES)], rng, findings)  # type: ignore[arg-type]  # mypy widens PHASES
        start("killed").join()
        sys.exit(report(options, findings))


class Starter:
    """Starts runs by forking a process that has loaded torch already, so that 50 restarts take minutes."""

    def __init__(self, num_iterations: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["scripts.base_train"])
        self._num_iterations = num_iterations

    def __call__(self, tag: str) -> ForkServerProcess:
        process = self._context.Process(target=train, args=(tag, self._num_iterations, str(rows_file(tag))))
        process.start()
        return process


def kill_once(start: Starter, phase: Phase, rng: random.Random, findings: Findings) -> None:
    """Start the run again, kill it at a random moment of a phase, and note from where it had gone on."""
    steps = {c.step: c.damage() is None for c in checkpoint.saved_steps(folder("killed"))}
    begun = len(read_rows("killed"))
    process = start("killed")
    if phase == "starting":
        time.sleep(rng.uniform(0.0, 1.0))
    else:
        size = rows_file("killed").stat().st_size if begun else 0
        wait_until(lambda: rows_file("killed").exists() and rows_file("killed").stat().st_size > size, process)
        time.sleep(rng.uniform(0.0, 0.5))
        if phase == "saving":
            wait_until(lambda: bool(half_written()), process)
            time.sleep(rng.uniform(0.0, 0.03))
    if not process.is_alive():
        raise RuntimeError(f"the run ended by itself before its kill (exit code {process.exitcode}): more iterations?")
    process.kill()
    process.join()
    findings.kills[phase] += 1
    findings.half_written += bool(half_written())
    this_time = read_rows("killed")[begun:]
    if this_time and (first := this_time[0][0]):
        findings.bad_checkpoints += not steps.get(first, False)
        findings.older_checkpoints += first != max(step for step, sound in steps.items() if sound)


def wait_until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Wait for something that the run does; it may also end before."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while process.is_alive() and not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not go on")
        time.sleep(0.0005)


def report(options: KillTestOptions, findings: Findings) -> int:
    """Print the comparison; the exit code, 0 if nothing was lost, repeated or used that should not have been."""
    expected, got = losses("never-stopped"), losses("killed")
    lost = sum(got.get(step) != loss for step, loss in expected.items())
    trained, reference = rows_trained("killed"), rows_trained("never-stopped")
    repeated, skipped = (trained - reference).total(), (reference - trained).total()
    last = {tag: checkpoint.checkpoints(folder(tag))[-1] for tag in ("never-stopped", "killed")}
    same = len({checkpoint.sha256(newest.folder / MODEL_FILE) for newest in last.values()}) == 1
    again = len(read_rows("killed")) - options.num_iterations
    kills = ", ".join(f"{count} {phase}" for phase, count in findings.kills.items())
    print(f"{cpu_name()}, {os.cpu_count()} cores; {software()}; commit {last['killed'].meta['commit']}")
    print(
        f"kills                      {findings.kills.total()} ({kills}); {findings.half_written} left a half checkpoint"
    )
    print(f"steps                      {options.num_iterations}, and {again} begun again")
    print(f"lost steps                 {lost}")
    print(f"repeated samples           {repeated}")
    print(f"skipped samples            {skipped}")
    print(f"bad checkpoints used       {findings.bad_checkpoints}")
    print(f"older than the newest used {findings.older_checkpoints}")
    print(f"final loss                 {got[options.num_iterations]!r}")
    print(f"final loss, never stopped  {expected[options.num_iterations]!r}")
    print(f"final weights              {'the same bit for bit' if same else 'not the same'}")
    return int(bool(lost or repeated or skipped or findings.bad_checkpoints or findings.older_checkpoints or not same))


def losses(tag: str) -> dict[int, float]:
    """The loss of each step of a run."""
    return {row["step"]: row["loss"] for row in read_steps(folder(tag) / METRICS_FILE)}


def folder(tag: str) -> Path:
    """Where the checkpoints of a run are."""
    return paths.checkpoints_dir("base") / tag


def half_written() -> list[Path]:
    """Checkpoints that are being written, or were when the run was killed."""
    return list(folder("killed").glob(".step_*.partial"))


def rows_file(tag: str) -> Path:
    """Where a run writes down which rows each step takes."""
    return paths.base_dir() / f"{tag}.rows"


def read_rows(tag: str) -> list[tuple[int, list[int]]]:
    """The steps that a run has begun over all its starts, and the rows of each."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in rows_file(tag).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                rows.append(tuple(json.loads(line)))
    return rows


def rows_trained(tag: str) -> Counter[int]:
    """How often each row went into the weights that a run ended with: a step that was begun again counts once."""
    return Counter(row for _, rows in dict(read_rows(tag)).items() for row in rows)


if __name__ == "__main__":
    cli.run(main, KillTestOptions)
