"""The model card: what a stranger wants to know, all of it from what the run left on disk."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
STAGE_SENTENCES = {
    "base": "continues text",
    "mid": "has learned what a conversation is",
    "sft": "answers questions",
    "rl": "answers questions, with practice on problems whose answers can be checked",
}
REAL_DATA = {
    "mid": ("HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"),
    "sft": ("allenai/ai2_arc", "openai/gsm8k", "HuggingFaceTB/smol-smoltalk"),
    "rl": ("openai/gsm8k",),
}
"""The data sets of the real mixtures, beside the project's own conversations."""
DEMO_TEXT, DEMO_CHAT = "leads of Wikipedia's vital articles", "chitchat-dataset"
LICENCES = {
    **{dataset.repository: dataset.license for dataset in DATASETS.values()},
    "HuggingFaceTB/smol-smoltalk": "Apache 2.0 where new",
    "cais/mmlu": "MIT",
    "openai/gsm8k": "MIT",
    "allenai/ai2_arc": "CC BY-SA 4.0",
    DEMO_TEXT: "CC BY-SA 4.0",
    DEMO_CHAT: "MIT",
}
TASK_DATA = {
    "arc easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "mmlu": ("cais/mmlu", "MMLU"),
    "gsm8k": ("openai/gsm8k", "GSM8K"),
    "humaneval": ("openai/openai_humaneval", "HumanEval"),
}
"""Tasks whose data set is on the hub: its repository, and what people call it."""


@dataclass(frozen=True)
class Publisher:
    """Who shares a model, and how."""

    account: str
    """on the hub; a person's or an organisation's"""
    name: str
    """for licence and citation"""
    license: str
    """the hub's identifier, such as mit"""

    def repository(self, found: dict[str, Any]) -> str:
        """Where the model of this meta (or of this parent) goes: account/name."""
        return f"{self.account}/{repository_name(found['tag'], found['source'])}"


def repository_name(tag: str, source: str) -> str:
    """What the repository of a stage of a model is called, such as nanochat-d20-sft."""
    words = re.sub(r"[^A-Za-z0-9.-]+|[.-]{2,}", "-", tag.removeprefix("nanochat-")).strip(".-")
    return f"nanochat-{words}-{source}"


def write_card(found: Checkpoint, stages: Sequence[Stage], publisher: Publisher, proof: str, folder: Path) -> None:
    """Write README.md, and the picture of the curves if there are any.

    `stages`: the one that is shared and those before it, as far as they are on disk; `proof`: what comparing with
    transformers gave.
    """
    trained = trained_here(stages)
    figure = draw_curves(trained, (LOSS, BITS_PER_BYTE))
    if figure:
        figure.savefig(folder / CURVE_FILE, dpi=120, facecolor="white")
    card = ModelCard.from_template(
        card_data(found, stages, publisher),
        template_str=TEMPLATE,
        **_facts(found, stages, publisher),
        **_training(trained),
        scores=[_score_line(*line) for line in _scores(stages)],
        proof=proof,
        curve=CURVE_FILE if figure else None,
    )
    card.save(folder / "README.md")


def card_data(found: Checkpoint, stages: Sequence[Stage], publisher: Publisher) -> ModelCardData:
    """The card's metadata: what the hub shows and searches, and what nanochat.sh import and upload_to_hf.py read."""
    meta = found.meta
    repository = publisher.repository(meta)
    return ModelCardData(
        language="en",
        license=publisher.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "dgx-spark"],
        base_model=base_model(found, publisher),
        datasets=[name for name in dict.fromkeys(_data_of(trained_here(stages))) if "/" in name] or None,
        model_name=repository.split("/")[1],
        eval_results=[_eval_result(*line) for line in _scores(stages)] or None,
        nanochat={
            "repository": repository,
            "stage": found.source,
            "tag": found.tag,
            "step": found.step,
            "tokenizer": meta["tokenizer"],
            "commit": meta["commit"],
        },
    )


def trained_here(stages: Sequence[Stage]) -> list[Stage]:
    """Those that were not imported."""
    return [stage for stage in stages if "origin" not in stage.facts]


def read_card(path: Path) -> dict[str, Any]:
    """What a card that `write_card` made says of its model: repository, stage, tag, step. Empty of any other."""
    try:
        told = ModelCard.load(path, ignore_metadata_errors=True).data.get("nanochat")
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    is_ours = (
        isinstance(told, dict)
        and told.get("stage") in STAGES
        and isinstance(told.get("step"), int)
        and isinstance(told.get("tag"), str)
        and isinstance(told.get("repository"), str)
    )
    return told if is_ours else {}


def base_model(found: Checkpoint, publisher: Publisher) -> str | None:
    """The repository of the model that this one grew from: where it was imported from, or the stage before."""
    if is_repository(origin := found.meta.get("origin", "")):
        return origin
    parent = found.meta["parent"]
    if not parent:
        return None
    kept = checkpoint.newest(parent["source"], parent["tag"], parent["step"])
    imported = kept.meta.get("origin", "") if kept and kept.meta["saved_at"] == parent["saved_at"] else ""
    return imported if is_repository(imported) else publisher.repository(parent)


def is_repository(origin: str) -> bool:
    """Whether it names a repository of the hub, and not a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None


def _facts(found: Checkpoint, stages: Sequence[Stage], publisher: Publisher) -> dict[str, Any]:
    """The part of the card about what it is."""
    config = GPTConfig(**found.meta["model_config"])
    repository = publisher.repository(found.meta)
    origin = stages[0].facts.get("origin") if stages else None
    begun = origin if origin and is_repository(origin) else "a model that was trained elsewhere"
    whence = f"It goes back to {begun}, shared" if origin else "It was trained from nothing on its owner's own machine"
    return {
        "name": repository.split("/")[1],
        "repository": repository,
        "stage": found.source,
        "is_chat": found.source != "base",
        "summary": (
            f"A language model of {config.num_parameters:,} parameters that {STAGE_SENTENCES[found.source]}. {whence} "
            "with nanochat for DGX Spark, after "
            "[nanochat](https://github.com/karpathy/nanochat) by Andrej Karpathy."
        ),
        "facts": [
            ("parameters", f"{config.num_parameters:,}"),
            ("layers, width", f"{config.n_layer}, {config.n_embd}"),
            ("heads, of them for keys and values", f"{config.n_head}, {config.n_kv_head}"),
            ("context", f"{config.sequence_len:,} tokens"),
            ("vocabulary", f"{config.vocab_size:,}, padded to a multiple of 64"),
            ("architecture", "`NanoChatForCausalLM`: rotary positions, QK-norm, squared ReLU, logits capped at 15"),
            ("weights", "bfloat16; trained in float32, computed in the dtype of the machine"),
        ],
        "context": f"{config.sequence_len:,}",
        "license": publisher.license,
        "author_name": publisher.name,
        "citation_key": repository.split("/")[1],
        "year": time.strftime("%Y"),
    }


def _training(stages: Sequence[Stage]) -> dict[str, Any]:
    """The part of the card about how it came to be."""
    tariff = Tariff.from_environment()
    energies = [stage.kwh(tariff) for stage in stages]
    lines = [
        {
            "source": stage.source,
            "steps": f"{stage.step:,}",
            "tokens": f"{stage.tokens:,}",
            "time": format_duration(stage.seconds),
            "energy": "" if energy is None else f"{energy:.3g} kWh",
            "machine": stage.facts["machine"],
            "learns": stage.facts.get("learns", "not recorded"),
            "sources": ", ".join(f"{name} ({LICENCES[name]})" for name in stage_data(stage)),
        }
        for stage, energy in zip(stages, energies, strict=True)
    ]
    chosen = {stage.source: {k: v for k, v in stage.facts["options"].items() if v is not None} for stage in stages}
    licences = "; ".join(f"{name}, {LICENCES[name]}" for name in dict.fromkeys(_data_of(stages)))
    seconds = sum(stage.seconds for stage in stages)
    together = f"Together {sum(stage.tokens for stage in stages):,} tokens in {format_duration(seconds)}."
    return {
        "stages": lines,
        "has_energy": any(energy is not None for energy in energies),
        "total": together if stages else "Not here; what it was trained on is not recorded.",
        "options": json.dumps(chosen, indent=1),
        "data_licences": licences or "see where it was imported from",
    }


def stage_data(stage: Stage) -> tuple[str, ...]:
    """The data sets that a stage learned from: repositories of the hub, or what comes with the installation."""
    options = stage.facts["options"]
    if stage.source == "base":
        dataset = options["dataset"]
        return (DATASETS[dataset].repository if dataset in DATASETS else DEMO_TEXT,)
    if options["mixture"] == "real":
        return REAL_DATA[stage.source]
    return () if stage.source == "rl" else (DEMO_TEXT, DEMO_CHAT)


def _data_of(stages: Sequence[Stage]) -> list[str]:
    return [name for stage in stages for name in stage_data(stage)]


def _scores(stages: Sequence[Stage]) -> list[tuple[str, float, float, float | None]]:
    """(task, value, standard error or 0, what guessing gives or None) of all that the last stage was measured on."""
    if not stages:
        return []
    lines: list[tuple[str, float, float, float | None]] = []
    result = stages[-1].stage_result
    if result:
        lines.append(("bits per byte", result.bits_per_byte, 0.0, None))
    for benchmark, scores in stages[-1].scores().items():
        if benchmark != "stages":
            lines.append((benchmark, centered_mean(scores), centered_mean_error(scores), 0.0))
        lines += [(score.task, score.accuracy, score.standard_error, score.baseline) for score in scores]
    return lines


def _score_line(task: str, value: float, error: float, guessing: float | None) -> dict[str, str]:
    if guessing is None:
        return {"task": f"{task}, held-out text", "guessing": "", "right": f"{value:.3f}"}
    if task in ("CORE", "ChatCORE"):
        return {"task": f"**{task}**, centred mean", "guessing": "0", "right": f"{value:.3f} ± {error:.3f}"}
    name = TASK_DATA.get(task, ("", task.removeprefix("bigbench_").replace("_", " ")))[1]
    return {"task": name, "guessing": f"{guessing:.0%}", "right": f"{value:.1%} ± {100 * error:.1f}"}


def _eval_result(task: str, value: float, error: float, guessing: float | None) -> EvalResult:
    """One line of the hub's model-index."""
    repository, name = TASK_DATA.get(task, (re.sub(r"\W+", "-", task), task))
    metric = "bits_per_byte" if guessing is None else "accuracy"
    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out" if guessing is None else repository,
        dataset_name="held-out text" if guessing is None else name,
        metric_type=metric,
        metric_name="centred accuracy" if task in ("CORE", "ChatCORE") else metric.replace("_", " "),
        metric_value=round(value, 4),
    )


def software() -> str:
    """The versions that a folder was made and checked with."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"
