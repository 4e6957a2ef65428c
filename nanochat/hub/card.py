"""The model card: README.md of an exported model, made from what the run left on disk."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nanochat.data.datasets import DATASETS
from nanochat.eval.results import centered_mean, centered_mean_error
from nanochat.model.gpt import GPTConfig
from nanochat.report.history import Stage
from nanochat.report.plots import BITS_PER_BYTE, LOSS, draw_curves
from nanochat.spark.plan import Tariff
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint
from nanochat.units import format_duration

TEMPLATE = (Path(__file__).parent / "card.md.jinja").read_text()
CURVE_FILE = "training.png"
DATA = json.loads((Path(__file__).parent / "card_data.json").read_text())
"""Data sets of the real mixtures and of the demo, their licenses, and the data sets of the evaluation tasks."""
LICENSES = DATA["licenses"] | {dataset.repository: dataset.license for dataset in DATASETS.values()}


@dataclass(frozen=True)
class Publisher:
    """Who shares a model, and under which license."""

    account: str
    """user or organization on the hub"""
    name: str
    """for license and citation"""
    license: str
    """the hub's identifier, such as mit"""

    def repository(self, meta: dict[str, Any]) -> str:
        """Repository of a checkpoint, given its meta or the `parent` in another one's: account/name."""
        return f"{self.account}/{repository_name(meta['tag'], meta['source'])}"


class Score(NamedTuple):
    """One row of the evaluations."""

    task: str
    value: float
    error: float = 0.0
    """standard error, 0 if unknown"""
    baseline: float | None = None
    """score of guessing, None if it has no meaning"""


def repository_name(tag: str, source: str) -> str:
    """Name of a repository, such as nanochat-d20-sft."""
    words = re.sub(r"[^A-Za-z0-9.-]+|[.-]{2,}", "-", tag.removeprefix("nanochat-")).strip(".-")
    return f"nanochat-{words}-{source}"


def software() -> str:
    """Versions of transformers and torch."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def write_card(found: Checkpoint, stages: Sequence[Stage], publisher: Publisher, verified: str, folder: Path) -> None:
    """Write README.md, and the plot of the training curves if there are any.

    `stages`: the exported stage and the earlier ones that are on disk; `verified`: result of the comparison with
    transformers.
    """
    trained = [stage for stage in stages if "origin" not in stage.facts]  # the others were imported
    scores = _scores(stages[-1]) if stages else []
    figure = draw_curves(trained, (LOSS, BITS_PER_BYTE))
    if figure:
        figure.savefig(folder / CURVE_FILE, dpi=120, facecolor="white")
    ModelCard.from_template(
        _metadata(found, trained, scores, publisher),
        template_str=TEMPLATE,
        **_facts(found, stages, publisher),
        **_training(trained),
        scores=[_score_row(score) for score in scores],
        verified=verified,
        curve=CURVE_FILE if figure else None,
    ).save(folder / "README.md")


def read_card(path: Path) -> dict[str, Any]:
    """Read repository, stage, tag and step from a card that `write_card` made; empty for any other card."""
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.get("nanochat")
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    types = {"stage": str, "step": int, "tag": str, "repository": str}
    is_ours = isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in types.items())
    return data if is_ours and data["stage"] in STAGES else {}


def base_model(found: Checkpoint, publisher: Publisher) -> str | None:
    """Repository of the model that this one was trained from: the imported model, or the previous stage."""
    if is_repository(origin := found.meta.get("origin", "")):
        return origin
    parent = found.meta["parent"]
    if not parent:
        return None
    saved = checkpoint.newest(parent["source"], parent["tag"], parent["step"])
    origin = saved.meta.get("origin", "") if saved and saved.meta["saved_at"] == parent["saved_at"] else ""
    return origin if is_repository(origin) else publisher.repository(parent)


def is_repository(origin: str) -> bool:
    """True for the name of a repository on the hub, False for a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None


def stage_data(stage: Stage) -> list[str]:
    """Data sets of a stage: repositories on the hub, or texts that come with the installation."""
    options = stage.facts["options"]
    if options.get("dataset") in DATASETS:
        return [DATASETS[options["dataset"]].repository]
    return list(DATA["mixtures" if options.get("mixture") == "real" else "demo"][stage.source])


def _all_data(stages: Sequence[Stage]) -> list[str]:
    return list(dict.fromkeys(name for stage in stages for name in stage_data(stage)))


def _metadata(
    found: Checkpoint, trained: Sequence[Stage], scores: Sequence[Score], publisher: Publisher
) -> ModelCardData:
    """YAML header of the card, which the hub searches and `read_card` reads."""
    repository = publisher.repository(found.meta)
    return ModelCardData(
        language="en",
        license=publisher.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "dgx-spark"],
        base_model=base_model(found, publisher),
        datasets=[name for name in _all_data(trained) if "/" in name] or None,
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


def _facts(found: Checkpoint, stages: Sequence[Stage], publisher: Publisher) -> dict[str, Any]:
    """Template variables that describe the model."""
    config = GPTConfig(**found.meta["model_config"])
    repository = publisher.repository(found.meta)
    origin = stages[0].facts.get("origin") if stages else None
    start = "from scratch"
    if origin:
        start = f"starting from {origin if is_repository(origin) else 'a model that was trained elsewhere'},"
    return {
        "name": repository.split("/")[1],
        "repository": repository,
        "stage": found.source,
        "is_chat": found.source != "base",
        "summary": (
            f"A language model with {config.num_parameters:,} parameters that {DATA['stages'][found.source]}. It was "
            f"trained {start} on its owner's machine with nanochat for DGX Spark, which is based on "
            "[nanochat](https://github.com/karpathy/nanochat) by Andrej Karpathy."
        ),
        "facts": [
            ("parameters", f"{config.num_parameters:,}"),
            ("layers, width", f"{config.n_layer}, {config.n_embd}"),
            ("heads, key/value heads", f"{config.n_head}, {config.n_kv_head}"),
            ("context", f"{config.sequence_len:,} tokens"),
            ("vocabulary", f"{config.vocab_size:,}, padded to a multiple of 64"),
            ("architecture", "`NanoChatForCausalLM`: rotary positions, QK-norm, squared ReLU, logits capped at 15"),
            ("weights", "bfloat16; trained in float32"),
        ],
        "context": f"{config.sequence_len:,}",
        "license": publisher.license,
        "author_name": publisher.name,
        "year": time.strftime("%Y"),
    }


def _training(stages: Sequence[Stage]) -> dict[str, Any]:
    """Template variables that describe the training."""
    if not stages:
        return {"stages": [], "total": "Not recorded.", "data_licenses": "see the model that it was imported from"}
    tariff = Tariff.from_environment()
    energies = [stage.kwh(tariff) for stage in stages]
    rows = [
        {
            "source": stage.source,
            "steps": f"{stage.step:,}",
            "tokens": f"{stage.tokens:,}",
            "time": format_duration(stage.seconds),
            "energy": "" if energy is None else f"{energy:.3g} kWh",
            "machine": stage.facts["machine"],
            "learns": stage.facts.get("learns", "not recorded"),
            "sources": ", ".join(f"{name} ({LICENSES[name]})" for name in stage_data(stage)),
        }
        for stage, energy in zip(stages, energies, strict=True)
    ]
    options = {stage.source: {k: v for k, v in stage.facts["options"].items() if v is not None} for stage in stages}
    tokens, seconds = sum(stage.tokens for stage in stages), sum(stage.seconds for stage in stages)
    return {
        "stages": rows,
        "has_energy": any(energy is not None for energy in energies),
        "total": f"Total: {tokens:,} tokens in {format_duration(seconds)}.",
        "options": json.dumps(options, indent=1),
        "data_licenses": "; ".join(f"{name}, {LICENSES[name]}" for name in _all_data(stages)),
    }


def _scores(stage: Stage) -> list[Score]:
    """All evaluation results of a stage."""
    result = stage.stage_result
    rows = [Score("bits per byte", result.bits_per_byte)] if result else []
    for benchmark, scores in stage.scores().items():
        if benchmark != "stages":
            rows.append(Score(benchmark, centered_mean(scores), centered_mean_error(scores), 0.0))
        rows += [Score(score.task, score.accuracy, score.standard_error, score.baseline) for score in scores]
    return rows


def _score_row(score: Score) -> dict[str, str]:
    if score.baseline is None:
        return {"task": f"{score.task}, held-out text", "guessing": "", "right": f"{score.value:.3f}"}
    if score.task in ("CORE", "ChatCORE"):
        right = f"{score.value:.3f} ± {score.error:.3f}"
        return {"task": f"**{score.task}**, centered mean", "guessing": "0", "right": right}
    default = score.task.removeprefix("bigbench_").replace("_", " ")
    _, name = DATA["tasks"].get(score.task, ("", default))
    right = f"{score.value:.1%} ± {100 * score.error:.1f}"
    return {"task": name, "guessing": f"{score.baseline:.0%}", "right": right}


def _eval_result(score: Score) -> EvalResult:
    """One entry of the hub's model-index."""
    repository, name = DATA["tasks"].get(score.task, (re.sub(r"\W+", "-", score.task), score.task))
    is_text = score.baseline is None
    metric = "bits_per_byte" if is_text else "accuracy"
    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out" if is_text else repository,
        dataset_name="held-out text" if is_text else name,
        metric_type=metric,
        metric_name="centered accuracy" if score.task in ("CORE", "ChatCORE") else metric.replace("_", " "),
        metric_value=round(score.value, 4),
    )
