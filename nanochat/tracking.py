"""What a run tells: metrics.jsonl always, a progress bar or lines, and wandb or trackio where they are wanted."""

import dataclasses
import importlib.util
import json
import math
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat.errors import UserError
from nanochat.machine.watch import MachineWatch

if TYPE_CHECKING:
    from nanochat.trainer import Training

FACTS_FILE, METRICS_FILE, SAMPLES_FILE = "run.json", "metrics.jsonl", "samples.jsonl"
"""In a model's folder, beside its checkpoints: what is known of the run, and what it told at each step."""
SECONDS_BETWEEN_LINES = 10.0
"""How often a run says how it stands where there is no terminal to draw a bar on."""


class RunLog:
    """All that tells of one run; a context manager. Processes but the main one say and write nothing."""

    def __init__(self, run: "Training", num_iterations: int, facts: Mapping[str, Any]) -> None:
        """`facts`, what is known of the run, goes to run.json. Raises UserError if its tracker is not installed."""
        main = run.runtime.is_main
        config = dataclasses.asdict(run.options)
        self._tracker = Tracker(
            run.options.tracker if main else "none", run.options.run, f"nanochat-{run.source}", config
        )
        path = run.folder / METRICS_FILE
        self._machine = MachineWatch(run, num_iterations, energy_used(path) if run.step else 0.0) if main else None
        self._metrics = StepLog(path, run.step) if main else None
        self._samples = StepLog(run.folder / SAMPLES_FILE, run.step) if main else None
        if main:
            (run.folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, default=str) + "\n")
        self._display = ProgressDisplay(
            f"{run.source} {run.tag}", num_iterations, run.step, Console() if main else None
        )
        self._smooth_loss = math.nan

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        self._tracker.close()
        for part in (self._metrics, self._samples, self._machine):
            if part:
                part.close()

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
        loss = metrics["loss"]
        self._smooth_loss = loss if math.isnan(self._smooth_loss) else 0.9 * self._smooth_loss + 0.1 * loss
        shown = {"reward": metrics["reward"]} if "reward" in metrics else {"loss": self._smooth_loss, **results}
        figures = "  ".join(f"{name} {figure:.3f}" for name, figure in shown.items())
        self._display.update(step, f"{figures}  {metrics['tokens_per_second']:,.0f} tok/s")

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
        kept = [row for row in read_steps(path) if row["step"] <= resume_step]
        partial = path.with_name(f"{path.name}.partial")  # a crash in between must not cost the log
        partial.write_text("".join(_line(row) for row in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, at once on disk's way."""
        self._file.write(_line({"step": step, **values}))

    def close(self) -> None:
        """Close the file."""
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
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def energy_used(path: Path) -> float:
    """Joules that the runs of a metrics.jsonl used so far, the steps that a resume takes again included."""
    return max((row.get("energy_j") or 0.0 for row in read_steps(path)), default=0.0)


class Tracker:
    """wandb, trackio or nothing, behind one `log`."""

    def __init__(self, kind: str, run: str | None, project: str, config: Mapping[str, Any]) -> None:
        """`kind` auto: wandb if the user named a run, or is logged in and it is installed. Never asks a question.

        Raises UserError if the tracker asked for is not installed.
        """
        if kind == "auto":
            wanted = run is not None or (is_logged_in_to_wandb() and importlib.util.find_spec("wandb") is not None)
            kind = "wandb" if wanted else "none"
        self._module: Any = None
        if kind == "none":
            return
        if importlib.util.find_spec(kind) is None:
            raise UserError(
                f"{kind} is not installed: run .venv/bin/pip install {kind}, or leave out --run and --tracker"
            )
        if kind == "wandb" and not is_logged_in_to_wandb():
            os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later; a login prompt would block
        self._module = importlib.import_module(kind)
        self._module.init(project=project, name=run, config=dict(config))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers of one step."""
        if self._module is not None:
            self._module.log({name: v for name, v in metrics.items() if isinstance(v, int | float)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._module is not None:
            self._module.finish()


def is_logged_in_to_wandb() -> bool:
    """Whether wandb can be used without asking who this is."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class ProgressDisplay:
    """A bar with loss, speed and time left on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str, total: int, start: int, console: Console | None) -> None:
        """`console` None: say nothing (the processes that are not the main one)."""
        self._console = console
        self._title = title
        self._total = total
        self._begun = (time.monotonic(), start)
        self._last_line = 0.0
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                expand=True,
            )
            self._task = self._progress.add_task(title, total=total, completed=start, figures="")
            self._progress.start()

    def update(self, step: int, figures: str) -> None:
        """`step` steps are done; `figures` is what to show beside, such as `loss 2.31  4,200 tok/s`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif self._console is not None:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
                self._last_line = now
                self.say(f"{self._title} {step}/{self._total}  {figures}  {self._time_left(step, now)} left")

    def _time_left(self, step: int, now: float) -> str:
        begun_at, begun_step = self._begun
        seconds = (now - begun_at) / max(step - begun_step, 1) * (self._total - step)
        return format_seconds(seconds)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()


def format_seconds(seconds: float) -> str:
    """`42s`, `3m05s`, `2h10m`, `9d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
