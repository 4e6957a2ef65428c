"""Read the files of a model's stages: facts, metrics, samples and scores, starting at the base stage."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from nanochat import paths
from nanochat.errors import UserError
from nanochat.eval.results import BENCHMARKS, Result, saved_result
from nanochat.spark.plan import Tariff
from nanochat.stages import STAGES
from nanochat.telemetry.run_log import FACTS_FILE, METRICS_FILE, SAMPLES_FILE, is_sample, read_steps
from nanochat.train.checkpoint import META_FILE, Checkpoint, checkpoints, is_same
from nanochat.untrusted import check_types, number, read_json, reading

FACTS: dict[str, type | UnionType] = {
    "source": str, "tag": str, "num_iterations": int, "model_config": dict, "num_parameters": int, "options": dict,
    "machine": str, "software": str, "parent": dict | None,
}  # fmt: skip
"""Types of the entries of run.json and meta.json that every report needs."""


@dataclass(frozen=True)
class Stage:
    """One stage of one model, finished or running."""

    facts: dict[str, Any]  # run.json, and the checkpoint's meta.json if there is one
    rows: list[dict[str, Any]]  # metrics.jsonl, one row per step
    samples: list[dict[str, Any]]  # samples.jsonl: steps, and the text that the model generated then
    checkpoint: Checkpoint | None  # newest checkpoint; None before the first is saved
    logged_at: float  # time of the last step, in seconds since 1970

    @property
    def source(self) -> str:
        return str(self.facts["source"])

    @property
    def label(self) -> str:
        """The stage's name, with its tag if it continues the same stage of another model."""
        parent = self.facts["parent"]
        return f"{self.source} {self.facts['tag']}" if parent and parent["source"] == self.source else self.source

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_finished(self) -> bool:
        return self.step >= self.facts["num_iterations"]

    @property
    def tokens(self) -> int:
        return int(sum(self.series("tokens")[1]))

    @property
    def seconds(self) -> float:
        """Wall time of all runs of this stage, including loading and evaluation."""
        return self.last("seconds") or 0.0

    def kwh(self, tariff: Tariff) -> float | None:
        """Energy used: from NANOCHAT_WATTS for every machine, else measured by the main machine's GPUs, else None."""
        if tariff.watts is not None:
            return tariff.watts * self.facts.get("machines", 1) * self.seconds / 3.6e6
        joules = self.last("energy_j")
        return None if joules is None else joules / 3.6e6

    def until(self, step: int) -> "Stage":
        """The stage as it was after `step`."""
        return dataclasses.replace(self, rows=[row for row in self.rows if row["step"] <= step])

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        values = [(row["step"], value) for row in self.rows if (value := number(row.get(key))) is not None]
        return [step for step, _ in values], [value for _, value in values]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    def results(self) -> dict[str, Result]:
        """Results of the checkpoint by benchmark, as far as evaluated."""
        kept = {name: self.checkpoint and saved_result(self.checkpoint, name) for name in BENCHMARKS}
        return {name: found[1] for name, found in kept.items() if found}


def results_by_benchmark(stages: Sequence[Stage]) -> dict[str, dict[str, Result]]:
    """Results by benchmark and stage, as far as evaluated."""
    results = {stage.label: stage.results() for stage in stages}
    by_stage = {name: {label: own[name] for label, own in results.items() if name in own} for name in BENCHMARKS}
    return {name: found for name, found in by_stage.items() if found}


def read_stage(folder: Path) -> Stage | None:
    """The stage whose checkpoints and logs are in `folder`; None if it has none."""
    checkpoint = saved[-1] if (saved := checkpoints(folder)) else None
    facts = dict(checkpoint.meta) if checkpoint else {}
    with contextlib.suppress(UserError), reading(folder / FACTS_FILE, "ignored"):  # a run may be writing it
        facts |= read_json(folder / FACTS_FILE)
    if not facts:
        return None
    with reading(folder / FACTS_FILE, f"move {folder} away"):
        check_types(facts, FACTS)
        check_types(facts["model_config"], dict.fromkeys(("n_layer", "n_embd", "sequence_len", "vocab_size"), int))
        if facts["source"] not in STAGES:
            raise ValueError(f"unknown stage {facts['source']!r}")
        if facts["parent"]:
            check_types(facts["parent"], {"source": str, "tag": str, "step": int, "saved_at": float})
            paths.check_tag(facts["parent"]["tag"])
    log = folder / METRICS_FILE
    samples = list(filter(is_sample, read_steps(folder / SAMPLES_FILE)))
    return Stage(facts, read_steps(log), samples, checkpoint, _modified_at(log))


def newest_stages(model_tag: str | None = None) -> list[Stage]:
    """The most recently trained stage, of any model or of `model_tag`, preceded by its ancestors.

    An ancestor whose checkpoint has been deleted ends the list. Raises UserError if nothing has been trained.
    """
    stages = _stages_up_to(newest_folder(model_tag))
    if not stages:
        which = f"tagged {model_tag} " if model_tag else ""
        raise UserError(f"no model {which}found in {paths.base_dir()}: run ./pretrain.sh first")
    return stages


def stages_until(found: Checkpoint) -> list[Stage]:
    """The stage of a checkpoint as of that checkpoint, preceded by its ancestors."""
    stages = _stages_up_to(found.folder.parent)
    if stages:
        facts = {**stages[-1].facts, **found.meta}
        stages[-1] = dataclasses.replace(stages[-1].until(found.step), facts=facts, checkpoint=found)
    return stages


def pretraining_text(stages: Sequence[Stage]) -> list[str]:
    """Values of --dataset of the last pretraining among `stages`; empty if it is not among them."""
    options = [stage.facts["options"] for stage in stages if stage.source == "base"]
    dataset = options[-1].get("dataset", []) if options else []
    return [dataset] if isinstance(dataset, str) else list(dataset)  # str before version 0.2


def _stages_up_to(folder: Path | None) -> list[Stage]:
    stages: list[Stage] = []
    seen = set()
    while folder and folder not in seen and (stage := read_stage(folder)):
        seen.add(folder)
        stages.insert(0, stage)
        folder = _parent_folder(stage)
    return stages


def newest_folder(model_tag: str | None = None) -> Path | None:
    """The folder of the stage that last logged a step or saved a checkpoint."""
    folders = [folder for source in STAGES for folder in paths.checkpoints_dir(source).glob(model_tag or "*")]
    patterns = (METRICS_FILE, f"step_*/{META_FILE}")
    written = [(folder, file) for folder in folders for pattern in patterns for file in folder.glob(pattern)]
    return max(written, key=lambda pair: _modified_at(pair[1]), default=(None, None))[0]


def _modified_at(file: Path) -> float:
    """0 if the file does not exist, or a running stage has pruned it meanwhile."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _parent_folder(stage: Stage) -> Path | None:
    """The folder of the checkpoint that `stage` started from, even if it has been set aside."""
    if not (parent := stage.facts["parent"]):
        return None
    folder = paths.checkpoints_dir(parent["source"])
    for candidate in (folder / parent["tag"], *folder.glob(f"aside/{parent['tag']}.*")):
        for found in checkpoints(candidate):
            if is_same(found.identity, parent):
                return candidate
    return None
