"""The log of a run: always metrics.jsonl, a progress bar or lines, and wandb or trackio if requested."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nanochat.atomic import atomic_write
from nanochat.errors import UserError
from nanochat.telemetry.console import LOG_FILE, LogFile, ProgressDisplay, Terminal
from nanochat.telemetry.sensors import MachineWatch
from nanochat.telemetry.trackers import Tracker
from nanochat.untrusted import check_types, number

if TYPE_CHECKING:
    from nanochat.train.run import TrainingRun

FACTS_FILE, METRICS_FILE, SAMPLES_FILE = "run.json", "metrics.jsonl", "samples.jsonl"
"""In a model's folder, next to its checkpoints."""
LAST_WORDS_SECONDS = 2.0


class RunLog(contextlib.AbstractContextManager["RunLog"]):
    """Everything that one run logs and prints. A context manager; only the main process writes."""

    def __init__(self, run: "TrainingRun", num_iterations: int, facts: Mapping[str, Any]) -> None:
        """`facts` about the run are written to run.json. Raises UserError if the requested tracker is not installed."""
        main = run.world.is_main
        self._folder = run.folder
        self._tracker = Tracker(
            run.options.tracker if main else "none",
            run.options.run,
            run.tracker_id,
            lambda failure: self.print(f"warning: {failure}; {METRICS_FILE} continues without it"),
        )
        path = run.folder / METRICS_FILE
        self._machine = MachineWatch(run, num_iterations, energy_used(path) if run.step else 0.0) if main else None
        self._metrics = StepLog(path, run.step) if main else None
        self._samples = StepLog(run.folder / SAMPLES_FILE, run.step) if main else None
        if main:
            machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # set by torchrun
            text = json.dumps({**facts, "machines": machines}, indent=2, default=str)
            (run.folder / FACTS_FILE).write_text(text + "\n")
        self._log = LogFile(run.folder / LOG_FILE) if main else None
        self._terminal = Terminal(self._log) if self._log else None
        self._display = ProgressDisplay(f"{run.source} {run.tag}", num_iterations, run.step, self._terminal, self._log)
        self.print = self._display.print
        self._tracker.start(f"nanochat-{run.source}", dataclasses.asdict(run.options))
        run.tracker_id = self._tracker.run_id
        self._smooth_loss = math.nan
        for row in read_steps(path):  # of a resumed run
            self._smooth(number(row.get("loss")))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._display.close()
        redirected = self._terminal is not None and self._terminal.gone  # then Python prints the error to the log
        if self._log and error and not isinstance(error, KeyboardInterrupt) and not redirected:
            trace = [] if isinstance(error, UserError) else traceback.format_exception(kind, error, at)
            self._log.print("".join([*trace, f"error: {error}"]))
        self._tracker.close()
        for part in (self._metrics, self._samples, self._machine, self._log):
            if part:
                part.close()

    def last_words(self, text: str) -> None:
        """Log and print why the run ends, from any process and thread, when no context will be left regularly."""
        (self._log or LogFile(self._folder / LOG_FILE)).print(text)

        def show() -> None:
            if self._log:
                self._display.show(text)
                self._display.close()
            else:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print(text, file=sys.stderr, flush=True)

        # In a thread: the main thread may hold the display's lock, and nobody may read the terminal.
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        thread.join(LAST_WORDS_SECONDS)

    def sync(self) -> None:
        """Force the logged steps to the disk, before a checkpoint counts them as done."""
        for log in (self._metrics, self._samples):
            if log:
                log.sync()

    def _smooth(self, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self._smooth_loss = loss if math.isnan(self._smooth_loss) else 0.9 * self._smooth_loss + 0.1 * loss

    def step(self, step: int, metrics: Mapping[str, float], results: Mapping[str, float]) -> None:
        """Log step number `step`, counted from 1, and update the progress; `results` are of the last evaluation."""
        if self._metrics and self._machine:
            metrics = {**metrics, **self._machine.readings()}
            self._metrics.log(step, metrics)
            for line in self._machine.news(step, metrics):
                self.print(line)
        self._tracker.log(step, metrics)
        self._smooth(metrics["loss"])
        shown = {"reward": metrics["reward"]} if "reward" in metrics else {"loss": self._smooth_loss, **results}
        figures = "  ".join(f"{name} {figure:.3f}" for name, figure in shown.items())
        self._display.update(step, f"{figures}  {metrics['tokens_per_second']:,.0f} tok/s")

    def results(self, step: int, results: Mapping[str, float], seconds: float) -> None:
        """Add the results of an evaluation to the line of the last step, and print them."""
        if self._metrics:
            self._metrics.amend(step, {**results, "seconds": seconds})
        self._tracker.log(step, results)
        self.print(f"step {step}: " + "  ".join(f"{name} {figure:.3f}" for name, figure in results.items()))

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Print and log text generated after step number `step`."""
        for text in texts:
            self.print(f"  {text}")
        if self._samples:
            self._samples.log(step, {"samples": list(texts)})


class StepLog:
    """metrics.jsonl or samples.jsonl: one JSON object per line, {"step": ..., ...}, steps counted from 1."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open for appending. Lines after step `resume_step`, of steps that will be repeated, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._pending = b""
        self._rewrite([row for row in read_steps(path) if row["step"] <= resume_step])

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file's lines and open it for more."""
        with atomic_write(self._path) as file:
            file.writelines(_line(row) for row in rows)
        self._file = self._path.open("ab", buffering=0)
        self._size = self._path.stat().st_size

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. While the disk is full, lines are kept for later."""
        self._pending += _line({"step": step, **values}).encode()
        self._write()

    def _write(self) -> None:
        try:
            written = self._file.write(self._pending)
        except OSError:
            return
        if written < len(self._pending):  # the disk is full now: half a line would merge with the next
            self._file.truncate(self._size)
            return
        self._size += written
        self._pending = b""

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the last line, if it belongs to this step. On a full disk they are lost."""
        *before, last = read_steps(self._path) or [{"step": 0}]
        if last["step"] == step:
            opened = self._file
            with contextlib.suppress(OSError):
                self._rewrite([*before, {**last, **values}])
                opened.close()

    def sync(self) -> None:
        """Force the lines to the disk. A full disk loses lines but does not end the run."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._write()
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    """A line of a StepLog. Infinities and NaN, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_steps(path: Path) -> list[dict[str, Any]]:
    """All valid lines of a StepLog; others, such as a last line cut off by a crash, are skipped."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            check_types(row, {"step": int})
            if all(isinstance(v, str | int | float | None) for v in row.values()) or is_sample(row):
                rows.append(row)
    return rows


def is_sample(row: Mapping[str, Any]) -> bool:
    """True for a line of samples.jsonl."""
    texts = row.get("samples")
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def energy_used(path: Path) -> float:
    """Joules in a metrics.jsonl so far, including steps repeated after a resume."""
    return max((number(row.get("energy_j")) or 0.0 for row in read_steps(path)), default=0.0)
