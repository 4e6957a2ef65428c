"""Compare a run that is killed with SIGKILL many times with the same run left alone.

python -m benchmarks.kill_test --kills 50

The exit code is 0 if both have the same losses and weights, every row was trained on as often, and each restart used
the newest intact checkpoint.
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
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from nanochat import cli, paths
from nanochat.data import batches
from nanochat.runtime import cpu_name, software
from nanochat.telemetry.run_log import METRICS_FILE, read_steps
from nanochat.train import checkpoint
from nanochat.train.checkpoint import MODEL_FILE
from nanochat.train.options import check_range
from scripts import base_train, prepare

SEQUENCE_LEN = 64
MAX_WAIT_SECONDS = 60.0
PHASES = ("starting", "training", "saving")
RESUME_ERRORS = DAMAGED, OLDER = "resumed from a damaged checkpoint", "resumed from an older checkpoint than possible"


@dataclass
class KillTestOptions:
    """Train a small model on the demo's text twice, kill one of the runs repeatedly, and compare."""

    kills: int = 50
    """at random moments: in turn while the run starts, trains and saves"""
    num_iterations: int = 1000
    """steps of each run; every fourth is saved"""
    seed: int = 1
    """for the moments of the kills"""

    def __post_init__(self) -> None:
        check_range("kills", self.kills, 0)
        check_range("num_iterations", self.num_iterations, 1)


class Run:
    """One training run in a child process, which records the rows of every step it starts."""

    def __init__(self, tag: str, num_iterations: int) -> None:
        self.folder = paths.checkpoints_dir("base") / tag
        self.rows_file = paths.base_dir() / f"{tag}.rows"
        # Forks a process that has imported torch, so that 50 restarts take minutes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scripts.base_train"])
        self._new_process = partial(context.Process, target=train, args=(tag, num_iterations, str(self.rows_file)))

    def start(self) -> ForkServerProcess:
        process = self._new_process()
        process.start()
        return process

    def started_steps(self) -> list[tuple[int, list[int]]]:
        """Every step that was started, over all restarts, with its rows."""
        steps = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.rows_file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # truncated by a kill
                    steps.append(tuple(json.loads(line)))
        return steps

    def rows(self) -> Counter[int]:
        """How often each row contributed to the final weights; of repeated steps only the last counts."""
        return Counter(row for rows in dict(self.started_steps()).values() for row in rows)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_steps(self.folder / METRICS_FILE)}

    def partial_checkpoints(self) -> list[Path]:
        """Checkpoints being written, or left incomplete by a kill."""
        return list(self.folder.glob(".step_*.partial"))


def train(tag: str, num_iterations: int, rows_file: str) -> None:
    """Start or resume the run, in a child process."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends

    class RecordingRowBatches(batches.RowBatches):
        def row_indices(self, step: int) -> list[int]:
            rows = super().row_indices(step)
            with open(rows_file, "a") as file:
                file.write(json.dumps([step, rows]) + "\n")
            return rows

    batches.RowBatches = RecordingRowBatches  # type: ignore[misc]  # the real stage, with a record of what it reads
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


def kill_once(run: Run, phase: str, rng: random.Random, counts: Counter[str]) -> None:
    """Start the run, kill it at a random moment of `phase`, and check which checkpoint it had resumed from."""
    intact = {saved.step: saved.damage() is None for saved in checkpoint.saved_steps(run.folder)}
    num_before = len(run.started_steps())
    size_before = run.rows_file.stat().st_size if run.rows_file.exists() else 0
    process = run.start()
    if phase == "starting":
        time.sleep(rng.uniform(0.0, 1.0))
    else:
        wait_until(lambda: run.rows_file.exists() and run.rows_file.stat().st_size > size_before, process)
        time.sleep(rng.uniform(0.0, 0.5))
        if phase == "saving":
            wait_until(lambda: bool(run.partial_checkpoints()), process)
            time.sleep(rng.uniform(0.0, 0.03))
    if not process.is_alive():
        raise RuntimeError(f"the run ended before its kill (exit code {process.exitcode}): raise --num-iterations")
    process.kill()
    process.join()
    counts[f"killed while {phase}"] += 1
    counts["kills that left a partial checkpoint"] += bool(run.partial_checkpoints())
    steps = run.started_steps()[num_before:]
    if steps and (start := steps[0][0]):
        counts[DAMAGED] += not intact.get(start, False)
        counts[OLDER] += start != max(step for step, sound in intact.items() if sound)


def wait_until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Poll until `condition` holds or the process ends. Raises TimeoutError."""
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while process.is_alive() and not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no progress in {MAX_WAIT_SECONDS:.0f} s")
        time.sleep(0.0005)


def main(options: KillTestOptions) -> None:
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        with contextlib.redirect_stdout(None):
            prepare.main(prepare.DEMO)
        reference, killed = (Run(tag, options.num_iterations) for tag in ("reference", "killed"))
        reference.start().join()
        rng = random.Random(options.seed)
        counts: Counter[str] = Counter()
        for number in range(options.kills):
            kill_once(killed, PHASES[number % len(PHASES)], rng, counts)
        killed.start().join()
        errors = compare(reference, killed) + Counter({name: counts[name] for name in RESUME_ERRORS})
        print(f"{cpu_name()}, {os.cpu_count()} cores; {software()}")
        print(f"{options.num_iterations} steps, {len(killed.started_steps()) - options.num_iterations} repeated")
        for name, count in (counts | errors).items():
            print(f"{name}: {count}")
        print(f"errors: {errors.total()}; final loss {killed.losses()[options.num_iterations]!r}")
        sys.exit(bool(errors))


def compare(reference: Run, killed: Run) -> Counter[str]:
    """Count the differences between both runs; those that are 0 are left out."""
    losses, rows, expected_rows = killed.losses(), killed.rows(), reference.rows()
    newest = [checkpoint.checkpoints(run.folder)[-1].folder / MODEL_FILE for run in (reference, killed)]
    return +Counter(
        {
            "steps with another loss": sum(losses.get(step) != loss for step, loss in reference.losses().items()),
            "repeated rows": (rows - expected_rows).total(),
            "skipped rows": (expected_rows - rows).total(),
            "different final weights": len({checkpoint.sha256(path) for path in newest}) - 1,
        }
    )


if __name__ == "__main__":
    cli.run(main, KillTestOptions)
