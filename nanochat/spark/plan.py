"""Estimates time and energy of every training stage, before a run and again after its first 20 steps.

The work follows from the shape of the model. Speeds are published figures of other people's runs, each with its
source, until a run has measured its own machine (MeasuredPlan).
"""

import contextlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat.atomic import atomic_write
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.stages import STAGES
from nanochat.units import format_duration

PLAN_FILE = "plan.json"
MID_TOKENS = 446e6
"""Conversations of one epoch: 851 steps of 524,288 tokens for 856K of them, as published for the same data sets under
a vocabulary of 32,768 (github.com/lakshmankolasani/lakshmankolasani.github.io, dgx-spark-nanochat-training)."""
SFT_TOKENS = 23_000 * 1000
"""Rows times tokens per row, padding included: assumed."""
RL_REPLIES, RL_REPLY_TOKENS, RL_PROMPT_TOKENS = 200 * 256, 256, 128
"""Replies of 200 steps at their maximum length, to prompts of GSM8K's typical length."""
DECODE_BATCH, BYTES_PER_WEIGHT_READ = 128, 8
"""Replies written at once (assumed), and bytes moved per weight and step: read in fp32, written and read in bf16."""
SPARK_FLOPS, SPARK_DECODE_BANDWIDTH = 0.40 * 125e12, 0.5 * 273e9
"""FLOP/s in training, and bytes/s while decoding (half of the datasheet's: assumed)."""
SPARK_WATTS, LINK_EFFICIENCY = 120.0, 0.97
MEASURED_STEPS, SKIPPED_STEPS = 20, 3
"""Steps before a run re-estimates, and how many of them do not count because they compile."""
MIN_SECONDS_LEFT = 3600.0
"""A run that ends sooner prints no estimate."""


@dataclass(frozen=True)
class Tariff:
    """Power and price of electricity from the environment; None if not set."""

    watts: float | None = None
    """power of a whole machine; GPUs measure only their own"""
    price_per_kwh: float | None = None
    """in the user's currency"""

    @classmethod
    def from_environment(cls) -> "Tariff":
        """Read NANOCHAT_WATTS and NANOCHAT_PRICE_PER_KWH. Raises UserError if one is not a number."""
        return cls(_number("NANOCHAT_WATTS"), _number("NANOCHAT_PRICE_PER_KWH"))


def _number(variable: str) -> float | None:
    text = os.environ.get(variable)
    try:
        return float(text) if text else None
    except ValueError:
        raise UserError(f'{variable} must be a number such as {variable}=0.3, got "{text}"') from None


@dataclass(frozen=True)
class StageWork:
    """The work of one stage."""

    name: str
    tokens: float
    """that pass through the model"""
    flops: float
    """training FLOPs; in RL, writing replies counts as what a GB10 could compute in that time"""


@dataclass(frozen=True)
class Machine:
    """Speed and power of one or several machines in training."""

    name: str
    flops: float
    """FLOP/s in training"""
    watts: float | None
    sources: Sequence[str]
    """references for the figures"""

    def hours(self, *work: StageWork) -> float:
        """Estimate the time of stages, validation and checkpoints not included."""
        return sum(stage.flops for stage in work) / self.flops / 3600

    def kwh(self, *work: StageWork) -> float | None:
        """Estimate the energy of stages; None if the power is unknown."""
        return None if self.watts is None else self.hours(*work) * self.watts / 1000


def machines(hosts: int, watts: float | None = None) -> list[Machine]:
    """One Spark and `hosts` of them. `watts`: power of one Spark, if the user measured it."""
    link = LINK_EFFICIENCY if hosts > 1 else 1.0
    mfu = (
        "MFU 40%: d20's 11.2B tokens in 9 days, github.com/jasonacox/dgx-spark (38% at d12: "
        "lakshmankolasani.github.io, 8.95e17 operations in 316.5 minutes)"
    )
    power = f"{SPARK_WATTS:g} W for the whole machine: github.com/jasonacox/dgx-spark"
    if watts is not None:
        power = f"{watts:g} W for the whole machine, from NANOCHAT_WATTS"
    watts = SPARK_WATTS if watts is None else watts
    scaling = f"{hosts} times one, times {link:.0%} for the link: assumed; reported for two at d24"
    return [
        Machine("GB10", SPARK_FLOPS, watts, (mfu, power)),
        Machine(f"{hosts} x GB10", SPARK_FLOPS * hosts * link, watts * hosts, (scaling,)),
    ]


def flops_per_token(config: GPTConfig) -> float:
    """FLOPs to train on one token, without allocating the model."""
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def stages_from(name: str, config: GPTConfig, tokens: float) -> list[StageWork]:
    """The work of the stage `name`, which has `tokens` left to train on, and of all later stages."""
    per_token = flops_per_token(config)
    per_stage = {"mid": MID_TOKENS, "sft": SFT_TOKENS, name: tokens}
    work = [StageWork(stage, count, count * per_token) for stage, count in per_stage.items() if stage != "rl"]
    rl_tokens = RL_REPLIES * (RL_PROMPT_TOKENS + RL_REPLY_TOKENS)
    kv_bytes = 2 * 2 * config.n_layer * config.n_kv_head * config.head_dim  # keys and values of one token in bf16
    context_bytes = DECODE_BATCH * kv_bytes * (RL_PROMPT_TOKENS + RL_REPLY_TOKENS / 2)
    bytes_per_decode_step = BYTES_PER_WEIGHT_READ * config.num_parameters + context_bytes
    decode_seconds = RL_REPLIES / DECODE_BATCH * RL_REPLY_TOKENS * bytes_per_decode_step / SPARK_DECODE_BANDWIDTH
    # RL also passes everything through the model without learning, for a third of the FLOPs.
    work.append(StageWork("rl", rl_tokens, rl_tokens * per_token * 4 / 3 + decode_seconds * SPARK_FLOPS))
    order = list(STAGES)
    work.sort(key=lambda stage: order.index(stage.name))
    return [stage for stage in work if order.index(stage.name) >= order.index(name)]


def stage_table(work: Sequence[StageWork], columns: Sequence[Machine], price_per_kwh: float | None) -> list[str]:
    """Lines with time and energy per stage and machine, the totals, and their cost if there is a price."""

    def row(name: str, tokens: str, cells: Sequence[str]) -> str:
        return f"{name:<13}{tokens:>6}" + "".join(f"{cell:>15}" for cell in cells)

    def cell(machine: Machine, *work: StageWork) -> str:
        time, kwh = format_duration(3600 * machine.hours(*work)), machine.kwh(*work)
        return (
            time if kwh is None else f"{time} {'<0.1' if kwh < 0.1 else format(kwh, '.1f' if kwh < 10 else ',.0f'):>4}"
        )

    lines = [row("", "tokens", [m.name if m.watts is None else f"{m.name}, kWh" for m in columns])]
    lines += [row(stage.name, format_count(stage.tokens), [cell(m, stage) for m in columns]) for stage in work]
    lines.append(row("total", "", [cell(m, *work) for m in columns]))
    if price_per_kwh is not None:
        costs = [None if kwh is None else kwh * price_per_kwh for kwh in (m.kwh(*work) for m in columns)]
        lines.append(row(f"at {price_per_kwh:g}/kWh", "", ["?" if c is None else f"{c:,.2f}" for c in costs]))
    return lines


def format_count(number: float) -> str:
    """`11.2B`, `446M`, `23M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:  # 999.9M rounds to 1,000M: print 1B
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


@dataclass(frozen=True)
class Plan:
    """An estimate that a run made from its own first steps, saved as plan.json."""

    machine: Machine
    step: int
    """after which it was made"""
    work: tuple[StageWork, ...]
    """the rest of the run's own stage, and the later ones"""

    def save(self, path: Path) -> None:
        """Write the file. A full disk is not an error: the table is printed anyway."""
        with contextlib.suppress(OSError), atomic_write(path) as file:
            json.dump(asdict(self), file, indent=2)

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """Read the file; None if there is none, or it has another format."""
        try:
            kept = json.loads(path.read_text())
            work = tuple(StageWork(**stage) for stage in kept["work"])
            return cls(Machine(**kept["machine"]), int(kept["step"]), work)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class MeasuredPlan:
    """Collects the first steps of a run, then estimates once how long the rest takes."""

    def __init__(self, source: str, config: GPTConfig, num_iterations: int, folder: Path) -> None:
        """`source`: the stage; `folder`: where the run keeps its files. Raises UserError if the tariff is invalid."""
        self._tariff = Tariff.from_environment()
        self._source = source
        self._config = config
        self._num_iterations = num_iterations
        self._file = folder / PLAN_FILE
        self._steps: list[Mapping[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Record the metrics of one step; return lines to print after the 20th of a long pretraining or midtraining."""
        if step == 1:
            self._file.unlink(missing_ok=True)  # of an earlier run that was killed before its first checkpoint
        # The steps of SFT and RL differ too much from each other.
        if self._source not in ("base", "mid") or len(self._steps) >= MEASURED_STEPS:
            return []
        self._steps.append(metrics)
        if len(self._steps) < MEASURED_STEPS:
            return []
        tokens_left = (self._num_iterations - step) * self._median("tokens")
        if tokens_left / self._median("tokens_per_second") < MIN_SECONDS_LEFT:
            return []
        machine = self._machine()
        work = stages_from(self._source, self._config, tokens_left)
        Plan(machine, step, tuple(work)).save(self._file)
        table = stage_table(work, [machine], self._tariff.price_per_kwh)
        return [machine.sources[0], "estimate for the rest at that speed:", *table]

    def _machine(self) -> Machine:
        watts, power = None, ""
        if self._tariff.watts is not None:
            watts = self._tariff.watts * int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # machines, set by torchrun
            power = f", {self._tariff.watts:,.0f} W per machine, from NANOCHAT_WATTS"
        elif any("gpu_power_w" in metrics for metrics in self._steps[SKIPPED_STEPS:]):
            watts = self._median("gpu_power_w")
            power = f", {watts:,.0f} W (GPU only)"
        flops = self._median("flops_per_second")
        source = (
            f"measured over {MEASURED_STEPS - SKIPPED_STEPS} steps: {self._median('tokens_per_second'):,.0f} tokens/s, "
            f"mfu {self._median('mfu'):.3f}{power}"
        )
        return Machine("here", flops, watts, (source,))

    def _median(self, key: str) -> float:
        return statistics.median(metrics[key] for metrics in self._steps[SKIPPED_STEPS:] if key in metrics)
