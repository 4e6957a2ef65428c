"""What a model's stages left on disk: facts, metrics, samples and scores, from the newest stage back to its base."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.eval.results import StageEvalConfig, StageResult, TaskScore, saved_result
from nanochat.spark.plan import PLAN_FILE, Plan, Tariff, read_plan
from nanochat.stages import STAGES
from nanochat.telemetry.run_log import FACTS_FILE, METRICS_FILE, SAMPLES_FILE, read_steps
from nanochat.train.checkpoint import META_FILE, Checkpoint, checkpoints


@dataclass(frozen=True)
class Stage:
    """One stage of one model, finished or going on."""

    facts: dict[str, Any]
    """what run.json says, and the checkpoint's meta.json if there is one"""
    rows: list[dict[str, Any]]
    """of metrics.jsonl, one a step"""
    samples: list[dict[str, Any]]
    """of samples.jsonl: a step, and what the model wrote then"""
    checkpoint: Checkpoint | None
    """None where none is saved yet"""
    logged_at: float
    """when the last step was, in seconds since 1970"""
    plan: Plan | None = None
    """what it said that it and the stages after it would take, if it was long enough to say so"""

    @property
    def source(self) -> str:
        """base, mid, sft or rl."""
        return str(self.facts["source"])

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps that were planned are taken."""
        return self.step >= self.facts["num_iterations"]

    @property
    def tokens(self) -> int:
        """Learned from in this stage."""
        return sum(row["tokens"] for row in self.rows)

    @property
    def seconds(self) -> float:
        """Wall time, loading and evaluating included, over all resumes."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def kwh(self, tariff: Tariff) -> float | None:
        """Energy used: NANOCHAT_WATTS of every machine, else as measured by the main machine's GPUs, else None."""
        if tariff.watts is not None:
            return tariff.watts * self.facts.get("machines", 1) * self.seconds / 3.6e6
        joules = self.last("energy_j")
        return None if joules is None else joules / 3.6e6

    def until(self, step: int) -> "Stage":
        """The stage as it was after `step`."""
        return dataclasses.replace(self, rows=[row for row in self.rows if row["step"] <= step])

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which `key` was measured and is finite, and what it was."""
        measured = [
            (row["step"], float(row[key]))
            for row in self.rows
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])
        ]
        return [step for step, _ in measured], [value for _, value in measured]

    def last(self, key: str) -> float | None:
        """What `key` was when it was last measured."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def stage_result(self) -> StageResult | None:
        """Its line in the table of stages, if the checkpoint has been measured."""
        kept = saved_result(self.checkpoint, "") if self.checkpoint else None
        return StageResult(**kept[1]) if kept else None

    def scores(self) -> dict[str, list[TaskScore]]:
        """By benchmark, what the checkpoint scored on its tasks, as far as it has been measured."""
        if self.checkpoint is None:
            return {}
        found: dict[str, list[TaskScore]] = {}
        table = saved_result(self.checkpoint, "")
        if table:
            key, result = table
            effort = StageEvalConfig(**{name: value for name, value in key.items() if name != "saved_at"})
            found["stages"] = StageResult(**result).task_scores(effort)
        for name in ("CORE", "ChatCORE"):
            kept = saved_result(self.checkpoint, f"-{name.lower()}")
            if kept:
                found[name] = [TaskScore(**score) for score in kept[1]]
        return found


def read_stage(folder: Path) -> Stage | None:
    """The stage whose checkpoints and logs are in `folder`; None if there are none."""
    saved = checkpoints(folder)
    checkpoint = saved[-1] if saved else None
    try:
        run: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        run = {}
    facts = {**(checkpoint.meta if checkpoint else {}), **run}
    log = folder / METRICS_FILE
    if not facts:
        return None
    logged_at = log.stat().st_mtime if log.exists() else 0.0
    samples, plan = read_steps(folder / SAMPLES_FILE), read_plan(folder / PLAN_FILE)
    return Stage(facts, read_steps(log), samples, checkpoint, logged_at, plan)


def newest_stages(model_tag: str | None = None) -> list[Stage]:
    """The stage that was trained last, of any model or of `model_tag`, and before it those that it grew from.

    Empty if there is none; the base is missing where its checkpoint has been deleted since.
    """
    return _stages_of(newest_folder(model_tag))


def stages_until(found: Checkpoint) -> list[Stage]:
    """The stage of a checkpoint as it was when that was saved, and before it those that it grew from."""
    stages = _stages_of(found.folder.parent)
    if stages:
        facts = {**stages[-1].facts, **found.meta}
        stages[-1] = dataclasses.replace(stages[-1].until(found.step), facts=facts, checkpoint=found)
    return stages


def _stages_of(current: Path | None) -> list[Stage]:
    stages: list[Stage] = []
    while current and (stage := read_stage(current)):
        stages.insert(0, stage)
        current = _parent_folder(stage)
    return stages


def newest_folder(model_tag: str | None = None) -> Path | None:
    """Where the stage is that logged a step last, or saved a checkpoint."""
    newest: tuple[float, Path] | None = None
    for source in STAGES:
        for folder in paths.checkpoints_dir(source).glob(model_tag or "*"):
            written = [*folder.glob(METRICS_FILE), *folder.glob(f"step_*/{META_FILE}")]
            time = max((_written_at(file) for file in written), default=None)
            if time is not None and (newest is None or time > newest[0]):
                newest = (time, folder)
    return newest[1] if newest else None


def _written_at(file: Path) -> float:
    """When a file was written; 0 if a run that goes on has pruned it meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _parent_folder(stage: Stage) -> Path | None:
    """Where the checkpoint is that `stage` grew from, also if it has been set aside."""
    parent = stage.facts["parent"]
    if not parent:
        return None
    folder = paths.checkpoints_dir(parent["source"])
    for candidate in (folder / parent["tag"], *folder.glob(f"aside/{parent['tag']}.*")):
        for found in checkpoints(candidate):
            if (found.step, found.meta["saved_at"]) == (parent["step"], parent["saved_at"]):
                return candidate
    return None
