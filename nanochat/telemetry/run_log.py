"""What a run tells: metrics.jsonl always, a progress bar or lines, and wandb or trackio where they are wanted."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat.errors import UserError
from nanochat.telemetry.console import LOG_FILE, LogFile, Terminal
from nanochat.telemetry.sensors import MachineWatch
from nanochat.telemetry.trackers import Tracker
from nanochat.units import format_duration

if TYPE_CHECKING:
    from nanochat.train.loop import Training

FACTS_FILE, METRICS_FILE, SAMPLES_FILE = "run.json", "metrics.jsonl", "samples.jsonl"
"""In a model's folder, beside its checkpoints: what is known of the run, and what it told at each step."""
SECONDS_BETWEEN_LINES = 10.0
"""How often a run says how it stands where there is no terminal to draw a bar on."""
SECONDS_FOR_LAST_WORDS = 2.0


class RunLog:
    """All that tells of one run; a context manager. Processes but the main one say and write nothing."""

    def __init__(self, run: "Training", num_iterations: int, facts: Mapping[str, Any]) -> None:
        """`facts`, what is known of the run, goes to run.json. Raises UserError if its tracker is not installed."""
        main = run.runtime.world.is_main
        self._folder = run.folder
        config = dataclasses.asdict(run.options)
        self._tracker = Tracker(
            run.options.tracker if main else "none", run.options.run, f"nanochat-{run.source}", config, run.tracker_id
        )
        run.tracker_id = self._tracker.run_id
        path = run.folder / METRICS_FILE
        self._machine = MachineWatch(run, num_iterations, energy_used(path) if run.step else 0.0) if main else None
        self._metrics = StepLog(path, run.step) if main else None
        self._samples = StepLog(run.folder / SAMPLES_FILE, run.step) if main else None
        if main:
            known = {**facts, "machines": int(os.environ.get("GROUP_WORLD_SIZE", "1"))}  # torchrun's number
            (run.folder / FACTS_FILE).write_text(json.dumps(known, indent=2, default=str) + "\n")
        self._log = LogFile(run.folder / LOG_FILE) if main else None
        self._terminal = Terminal(self._log) if self._log else None
        self._display = ProgressDisplay(f"{run.source} {run.tag}", num_iterations, run.step, self._terminal, self._log)
        self._smooth_loss = math.nan
        self._tell_trouble()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._display.close()
        if self._log and error and not isinstance(error, KeyboardInterrupt) and not self._is_alone():
            trace = [] if isinstance(error, UserError) else traceback.format_exception(kind, error, at)
            self._log.say("".join([*trace, f"error: {error}"]))
        self._tracker.close()
        self._tell_trouble()
        for part in (self._metrics, self._samples, self._machine, self._log):
            if part:
                part.close()

    def _tell_trouble(self) -> None:
        if trouble := self._tracker.trouble():
            self.say(f"warning: {trouble}; {METRICS_FILE} is written without it")

    def _is_alone(self) -> bool:
        """Whether nobody is at the terminal any more, so that what is printed goes to the log."""
        return self._terminal is not None and self._terminal.gone

    def last_words(self, text: str) -> None:
        """Say why the run ends, from whichever process and thread, which ends without leaving this context."""
        (self._log or LogFile(self._folder / LOG_FILE)).say(text)
        # The main thread may hold what the display needs, and nobody may read it.
        shown = threading.Thread(target=self._show_last_words, args=(text,), daemon=True)
        shown.start()
        shown.join(SECONDS_FOR_LAST_WORDS)

    def _show_last_words(self, text: str) -> None:
        if self._log:
            self._display.show(text)
            self._display.close()
        else:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(text, file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Force what was logged so far to the disk, before a checkpoint says that these steps are done."""
        for log in (self._metrics, self._samples):
            if log:
                log.sync()

    def say(self, text: str) -> None:
        """Print a line."""
        self._display.say(text)

    def step(self, step: int, metrics: Mapping[str, float], results: Mapping[str, float]) -> None:
        """Log step number `step`, counted from 1, and show how it goes; `results` are of the last evaluation."""
        if self._metrics and self._machine:
            metrics = {**metrics, **self._machine.readings()}
            self._metrics.log(step, metrics)
            for line in self._machine.news(step, metrics):
                self.say(line)
        self._tracker.log(step, metrics)
        self._tell_trouble()
        loss = metrics["loss"]
        smooth = 0.9 * self._smooth_loss + 0.1 * loss
        self._smooth_loss = smooth if math.isfinite(smooth) else loss
        shown = {"reward": metrics["reward"]} if "reward" in metrics else {"loss": self._smooth_loss, **results}
        figures = "  ".join(f"{name} {figure:.3f}" for name, figure in shown.items())
        self._display.update(step, f"{figures}  {metrics['tokens_per_second']:,.0f} tok/s")

    def results(self, step: int, results: Mapping[str, float], seconds: float) -> None:
        """Add to the line of the last step what its evaluation found, and tell it."""
        if self._metrics:
            self._metrics.amend(step, {**results, "seconds": seconds})
        self._tracker.log(step, results)
        self._tell_trouble()
        self.say(f"step {step}: " + "  ".join(f"{name} {figure:.3f}" for name, figure in results.items()))

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Show what the model writes after step number `step`, and keep it."""
        for text in texts:
            self.say(f"  {text}")
        if self._samples:
            self._samples.log(step, {"samples": list(texts)})


class StepLog:
    """metrics.jsonl, samples.jsonl: one JSON object a line, {"step": ..., ...}, steps counted from 1."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open for appending; what a stopped run logged after step `resume_step` is dropped, for it comes again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._waiting = b""
        self._open([row for row in read_steps(path) if row["step"] <= resume_step])

    def _open(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Let the file hold these lines, and more to come."""
        partial = self._path.with_name(f"{self._path.name}.partial")  # a crash in between must not cost the log
        with partial.open("w") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._file = self._path.open("ab", buffering=0)
        self._size = self._file.tell()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, at once on disk's way. While the disk is full, lines wait for room."""
        self._waiting += _line({"step": step, **values}).encode()
        self._write()

    def _write(self) -> None:
        try:
            written = self._file.write(self._waiting)
        except OSError:
            return
        if written < len(self._waiting):  # that was the last of the room: half a line would join the next
            self._file.truncate(self._size)
            return
        self._size += written
        self._waiting = b""

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add to the last line, if that is of this step; a full disk costs what was to be added."""
        *before, last = read_steps(self._path) or [{"step": 0}]
        if last["step"] == step:
            opened = self._file
            with contextlib.suppress(OSError):
                self._open([*before, {**last, **values}])
                opened.close()

    def sync(self) -> None:
        """Force the lines to the disk; a full one costs lines, not the run."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._write()
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    """One line of a StepLog. JSON has no word for infinity or not a number: they become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_steps(path: Path) -> list[dict[str, Any]]:
    """All whole lines of what a StepLog wrote; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def energy_used(path: Path) -> float:
    """Joules that the runs of a metrics.jsonl used so far, the steps that a resume takes again included."""
    return max((row.get("energy_j") or 0.0 for row in read_steps(path)), default=0.0)


class ProgressDisplay:
    """A bar with loss, speed and time left on a terminal; elsewhere, and in the log, a line now and then."""

    def __init__(self, title: str, total: int, start: int, terminal: io.TextIOBase | None, log: LogFile | None) -> None:
        """Both None: say nothing (the processes that are not the main one)."""
        self._console = Console(file=cast(TextIO, terminal)) if terminal else None
        self._log = log
        self._title = title
        self._total = total
        self._begun = (time.monotonic(), start)
        self._last_line = 0.0
        self._progress: Progress | None = None
        if self._console and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task(title, total=total, completed=start, figures="")
            self._progress.start()

    def update(self, step: int, figures: str) -> None:
        """`step` steps are done; `figures` is what to show beside, such as `loss 2.31  4,200 tok/s`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = now
            line = f"{self._title} {step}/{self._total}  {figures}  {self._time_left(step, now)} left"
            if self._progress is None:
                self.show(line)
            if self._log:
                self._log.say(line)

    def _time_left(self, step: int, now: float) -> str:
        begun_at, begun_step = self._begun
        seconds = (now - begun_at) / max(step - begun_step, 1) * (self._total - step)
        return format_duration(seconds)

    def say(self, text: str) -> None:
        """Print a line above the bar, and log it."""
        self.show(text)
        if self._log:
            self._log.say(text)

    def show(self, text: str) -> None:
        """Print a line above the bar."""
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
