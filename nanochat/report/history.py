"""Reads what the stages of a model left on disk: facts, metrics, samples and scores, from the base stage on."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.eval.results import StageEvalConfig, StageResult, TaskScore, saved_result
from nanochat.spark.plan import PLAN_FILE, Plan, Tariff
from nanochat.stages import STAGES
from nanochat.telemetry.run_log import FACTS_FILE, METRICS_FILE, SAMPLES_FILE, read_steps
from nanochat.train.checkpoint import META_FILE, Checkpoint, checkpoints


@dataclass(frozen=True)
class Stage:
    """One stage of one model, finished or running."""

    facts: dict[str, Any]
    """run.json, and the checkpoint's meta.json if there is one"""
    rows: list[dict[str, Any]]
    """metrics.jsonl, one row per step"""
    samples: list[dict[str, Any]]
    """samples.jsonl: a step, and the text that the model wrote then"""
    checkpoint: Checkpoint | None
    """the newest; None before the first is saved"""
    logged_at: float
    """time of the last step, in seconds since 1970"""
    plan: Plan | None = None
    """the run's estimate for itself and the later stages"""

    @property
    def source(self) -> str:
        return str(self.facts["source"])

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_finished(self) -> bool:
        return self.step >= self.facts["num_iterations"]

    @property
    def tokens(self) -> int:
        return sum(row["tokens"] for row in self.rows)

    @property
    def seconds(self) -> float:
        """Wall time of all runs of this stage, loading and evaluation included."""
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
        """Steps and finite values of a metric."""
        measured = [
            (row["step"], float(row[key]))
            for row in self.rows
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])
        ]
        return [step for step, _ in measured], [value for _, value in measured]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def stage_result(self) -> StageResult | None:
        """Line of the checkpoint in the table of stages, if it has been evaluated."""
        kept = saved_result(self.checkpoint, "") if self.checkpoint else None
        return StageResult(**kept[1]) if kept else None

    def scores(self) -> dict[str, list[TaskScore]]:
        """Task scores of the checkpoint by benchmark: stages, CORE and ChatCORE, as far as evaluated."""
        if self.checkpoint is None:
            return {}
        found: dict[str, list[TaskScore]] = {}
        if kept := saved_result(self.checkpoint, ""):
            key, result = kept
            config = StageEvalConfig(**{name: value for name, value in key.items() if name != "saved_at"})
            found["stages"] = StageResult(**result).task_scores(config)
        for name in ("CORE", "ChatCORE"):
            if kept := saved_result(self.checkpoint, f"-{name.lower()}"):
                found[name] = [TaskScore(**score) for score in kept[1]]
        return found


def read_stage(folder: Path) -> Stage | None:
    """The stage whose checkpoints and logs are in `folder`; None if there are none."""
    checkpoint = saved[-1] if (saved := checkpoints(folder)) else None
    try:
        run: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        run = {}
    facts = {**(checkpoint.meta if checkpoint else {}), **run}
    if not facts:
        return None
    log = folder / METRICS_FILE
    samples, plan = read_steps(folder / SAMPLES_FILE), Plan.load(folder / PLAN_FILE)
    return Stage(facts, read_steps(log), samples, checkpoint, _modified_at(log), plan)


def newest_stages(model_tag: str | None = None) -> list[Stage]:
    """The stage that was trained last, of any model or of `model_tag`, preceded by its ancestors.

    Empty if there is none; an ancestor whose checkpoint has been deleted ends the list.
    """
    return _stages_up_to(newest_folder(model_tag))


def stages_until(found: Checkpoint) -> list[Stage]:
    """The stage of a checkpoint as of that checkpoint, preceded by its ancestors."""
    stages = _stages_up_to(found.folder.parent)
    if stages:
        facts = {**stages[-1].facts, **found.meta}
        stages[-1] = dataclasses.replace(stages[-1].until(found.step), facts=facts, checkpoint=found)
    return stages


def _stages_up_to(folder: Path | None) -> list[Stage]:
    stages: list[Stage] = []
    while folder and (stage := read_stage(folder)):
        stages.insert(0, stage)
        folder = _parent_folder(stage)
    return stages


def newest_folder(model_tag: str | None = None) -> Path | None:
    """The folder of the stage that last logged a step or saved a checkpoint."""
    modified: dict[Path, float] = {}
    for source in STAGES:
        for folder in paths.checkpoints_dir(source).glob(model_tag or "*"):
            written = [*folder.glob(METRICS_FILE), *folder.glob(f"step_*/{META_FILE}")]
            if written:
                modified[folder] = max(map(_modified_at, written))
    return max(modified, key=modified.__getitem__, default=None)


def _modified_at(file: Path) -> float:
    """0 if the file does not exist, or a running stage has pruned it meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _parent_folder(stage: Stage) -> Path | None:
    """The folder of the checkpoint that `stage` started from, also if it has been set aside."""
    parent = stage.facts["parent"]
    if not parent:
        return None
    folder = paths.checkpoints_dir(parent["source"])
    for candidate in (folder / parent["tag"], *folder.glob(f"aside/{parent['tag']}.*")):
        for found in checkpoints(candidate):
            if (found.step, found.meta["saved_at"]) == (parent["step"], parent["saved_at"]):
                return candidate
    return None
