"""The model card: README.md of an exported model, generated from the files of its run."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nanochat.data.sources import DATASETS, parse
from nanochat.errors import UserError
from nanochat.eval.results import CENTERED, centered_mean, centered_mean_error
from nanochat.report.history import Stage, pretraining_text
from nanochat.report.plots import CURVES, draw_curves
from nanochat.spark.plan import Tariff
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint
from nanochat.units import format_duration
from nanochat.untrusted import reading

DATA = json.loads(Path(__file__).with_name("card_data.json").read_text())
"""Datasets behind the names in mixtures.yaml, their licenses, and the datasets of the evaluation tasks."""
MAX_STEP = 10**9


@dataclass(frozen=True)
class Publisher:
    """Author and license of a shared model."""

    account: str  # user or organization on the hub
    name: str  # for license and citation
    license: str  # the hub's identifier, such as mit

    def repository(self, meta: dict[str, Any]) -> str:
        """Repository (account/name) of a checkpoint, given its meta or the `parent` in its successor's."""
        return f"{self.account}/{repository_name(meta['tag'], meta['source'])}"


class Score(NamedTuple):
    name: str
    dataset: str
    metric: str
    value: float
    error: float = 0.0  # standard error, 0 if unknown
    baseline: float | None = None  # score of guessing, None for bits per byte


def repository_name(tag: str, source: str) -> str:
    """Name of a repository, such as nanochat-d20-sft."""
    words = re.sub(r"[^A-Za-z0-9.-]+|[.-]{2,}", "-", tag.removeprefix("nanochat-")).strip(".-")
    return f"nanochat-{words}-{source}"


def write_card(
    found: Checkpoint,
    stages: Sequence[Stage],
    publisher: Publisher,
    verified: str,
    gguf: Sequence[str],
    folder: Path,
) -> None:
    """Write README.md, and the plot of the training curves if there are any.

    `stages`: the exported stage and the earlier ones that are on disk; `verified`: results of the comparisons with
    other programs; `gguf`: types of the GGUF files, the preferred one first.
    """
    trained = [stage for stage in stages if "origin" not in stage.facts]  # the others were imported
    data = {stage.label: _stage_data(stage) for stage in trained}
    licenses = {name: license for stage in data.values() for name, license in stage.items()}
    is_english = all(name.split(":")[0] in DATASETS for name in pretraining_text(trained))
    scores = _scores(stages[-1]) if stages else []
    repository = publisher.repository(found.meta)
    metadata = ModelCardData(
        language="en" if is_english else None,
        license=publisher.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "dgx-spark"],
        base_model=base_model(found, publisher),
        datasets=[name for name in licenses if "/" in name] or None,
        model_name=repository.split("/")[1],
        eval_results=[_eval_result(score) for score in scores] or None,
        nanochat={
            "repository": repository,
            "stage": found.source,
            "tag": found.tag,
            "step": found.step,
            "tokenizer": found.meta["tokenizer"],
            "commit": found.meta["commit"],
        },
    )
    figure = draw_curves(trained, CURVES["loss"] + CURVES["bits-per-byte"])
    if figure:
        figure.savefig(folder / "training.png", dpi=120, facecolor="white")
    tariff = Tariff.from_environment()
    origin = stages[0].facts.get("origin") if stages else None
    options = {stage.label: {k: v for k, v in stage.facts["options"].items() if v is not None} for stage in trained}
    ModelCard.from_template(
        metadata,
        template_str=Path(__file__).with_name("card.md.jinja").read_text(),
        repository=repository,
        name=repository.split("/")[1],
        author=publisher.name,
        year=time.strftime("%Y"),
        stage=found.source,
        ability=DATA["stages"].get(found.source, STAGES[found.source].title),
        origin=origin if origin is None or _is_repository(origin) else "a model trained elsewhere",
        config=found.config,
        verified=verified,
        gguf=gguf,
        stages=trained,
        kwh={stage.label: energy for stage in trained if (energy := stage.kwh(tariff)) is not None},
        format_duration=format_duration,
        without_folders=_without_folders,
        data=data,
        licenses=licenses,
        is_english=is_english,
        options=_without_folders(json.dumps(options, indent=1)),
        curve="training.png" if figure else None,
        scores=scores,
    ).save(folder / "README.md")


def read_card(path: Path) -> dict[str, Any]:
    """Read repository, stage, tag and step from a card that `write_card` made; empty for any other card."""
    data: Any = None
    with suppress(UserError), reading(path, "not a model card"):
        data = ModelCard.load(path, ignore_metadata_errors=True).data.get("nanochat")
    types = {"stage": str, "step": int, "tag": str, "repository": str}
    is_ours = isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in types.items())
    return data if is_ours and data["stage"] in STAGES and 0 <= data["step"] < MAX_STEP else {}


def base_model(found: Checkpoint, publisher: Publisher) -> str | None:
    """Repository of the model that this one was trained from: the imported model, or the previous stage."""
    if _is_repository(origin := found.meta.get("origin", "")):
        return origin
    parent = found.meta["parent"]
    if not parent:
        return None
    saved = checkpoint.newest(parent["source"], parent["tag"], parent["step"])
    origin = saved.meta.get("origin", "") if saved and checkpoint.is_same(saved.identity, parent) else ""
    return origin if _is_repository(origin) else publisher.repository(parent)


def _is_repository(origin: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None  # else a folder


def _stage_data(stage: Stage) -> dict[str, str | None]:
    """Licenses of a stage's data, by repository or name. Raises UserError if the license of a text is unknown."""
    if stage.source != "base":
        mixture: Any = None
        with suppress(yaml.YAMLError):  # before version 0.3 it was not YAML
            mixture = yaml.safe_load(str(stage.facts.get("trained_on")))
        names = mixture.get(stage.source, {}) if isinstance(mixture, dict) else {}
        found = (DATA["sources"].get(name, name if _is_repository(name) else None) for name in names)
        return {name: DATA["licenses"].get(name) for name in found if name}
    licenses: dict[str, str | None] = {}
    for source in parse(pretraining_text([stage])):
        if not source.license:
            raise UserError(
                f"the license of {source.name}, on which {stage.facts['tag']} was trained, is not known: run "
                f"./prepare.sh --dataset {source.record.get('location') or source.name} --license, such as cc-by-4.0"
            )
        licenses[source.repository or DATA["sources"].get(source.name, source.name)] = source.license
    return licenses


def _without_folders(text: object) -> str:
    """Reduce paths at the start of lines or of strings to file names."""
    return re.sub(r'(^ *"?|")[~.]*/.*/', r"\1", str(text), flags=re.MULTILINE)


def _scores(stage: Stage) -> list[Score]:
    rows = []
    for benchmark, result in stage.results().items():
        if result.bits_per_byte is not None:
            rows.append(Score("held-out text", "held-out", "bits per byte", result.bits_per_byte))
        if benchmark in CENTERED:
            mean, error = centered_mean(result.scores), centered_mean_error(result.scores)
            rows.append(Score(benchmark, benchmark, "centered accuracy", mean, error, 0.0))
        for score in result.scores:
            dataset, name = DATA["tasks"].get(score.task, (re.sub(r"\W+", "-", score.task), score.task))
            rows.append(Score(name, dataset, "accuracy", score.accuracy, score.standard_error, score.baseline))
    return rows


def _eval_result(score: Score) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.dataset,
        dataset_name=score.name,
        metric_type="bits_per_byte" if score.baseline is None else "accuracy",
        metric_name=score.metric,
        metric_value=round(score.value, 4),
    )
