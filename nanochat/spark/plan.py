"""Estimate the time and energy of every training stage from the shape of the model and the speed of a machine.

A run estimates again after its first 20 steps, at its own speed (MeasuredPlan).
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.data.batches import PIECES_PER_ROW
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.stages import STAGES
from nanochat.train.options import PretrainOptions
from nanochat.units import format_duration

MID_TOKENS = 446e6
"""Conversations of one epoch: 851 steps of 524,288 tokens for 856K of them, as published for the same datasets under
a vocabulary of 32,768 (github.com/lakshmankolasani/lakshmankolasani.github.io, dgx-spark-nanochat-training)."""
SFT_TOKENS = 23_000 * 1000  # rows times tokens per row, including padding (assumed)
RL_REPLIES, RL_REPLY_TOKENS, RL_PROMPT_TOKENS = 200 * 256, 256, 128
"""200 steps of replies at their maximum length, to prompts of GSM8K's typical length."""
DECODE_BATCH, BYTES_PER_WEIGHT_READ = 128, 8
"""Replies generated at once (assumed), and bytes moved per weight and step: read in fp32, written and read in bf16."""
SPARK_MFU = 0.48
SPARK_FLOPS, SPARK_DECODE_BANDWIDTH = SPARK_MFU * 125e12, 0.5 * 273e9
"""FLOP/s in training, and bytes/s while decoding (half of the datasheet's, assumed)."""
MEASURED_STEPS, SKIPPED_STEPS = 20, 3
"""Steps after which a run re-estimates, and how many of them do not count because they compile."""
MIN_SECONDS_LEFT = 3600.0  # a run that ends sooner prints no estimate


@dataclass(frozen=True)
class Tariff:
    """Power and price of electricity from the environment; None if not set."""

    watts: float | None = None  # power of a whole machine; GPUs only measure their own
    price_per_kwh: float | None = None  # in the user's currency

    @classmethod
    def from_environment(cls) -> "Tariff":
        """Read NANOCHAT_WATTS and NANOCHAT_PRICE_PER_KWH. Raises UserError if one is not a number."""
        numbers: list[float | None] = []
        for variable in ("NANOCHAT_WATTS", "NANOCHAT_PRICE_PER_KWH"):
            text = os.environ.get(variable)
            try:
                numbers.append(float(text) if text else None)
            except ValueError:
                raise UserError(f'{variable} must be a number such as {variable}=0.3, got "{text}"') from None
        return cls(*numbers)


@dataclass(frozen=True)
class StageWork:
    name: str
    tokens: float  # that pass through the model
    flops: float  # training FLOPs; in RL, generating replies counts as what a GB10 could compute in that time


@dataclass(frozen=True)
class Machine:
    """Speed and power of one or several machines, with references for the figures."""

    name: str
    flops: float  # FLOP/s in training
    watts: float | None
    sources: Sequence[str]

    def hours(self, *work: StageWork) -> float:
        """Estimate the time of stages, excluding validation and checkpoints."""
        return sum(stage.flops for stage in work) / self.flops / 3600

    def kwh(self, *work: StageWork) -> float | None:
        """Estimate the energy of stages; None if the power is unknown."""
        return None if self.watts is None else self.hours(*work) * self.watts / 1000


def flops_per_token(config: GPTConfig, short_rows_ratio: float = 0.0) -> float:
    """FLOPs to train on one token, on average, if a share of the steps has rows of a quarter of the context."""
    with torch.device("meta"):
        model = GPT(config)
    short, whole = model.flops_per_token(config.sequence_len // PIECES_PER_ROW), model.flops_per_token()
    return short_rows_ratio * short + (1 - short_rows_ratio) * whole


def pretraining(config: GPTConfig, tokens: float) -> StageWork:
    """The work of pretraining on `tokens` with the default share of short rows."""
    return StageWork("base", tokens, tokens * flops_per_token(config, PretrainOptions.short_rows_ratio))


def stages_from(name: str, config: GPTConfig, tokens: float) -> list[StageWork]:
    """The work of stage `name`, which has `tokens` left to train on, and of all later stages."""
    per_token = flops_per_token(config)
    rl_tokens = RL_REPLIES * (RL_PROMPT_TOKENS + RL_REPLY_TOKENS)
    kv_bytes = 2 * 2 * config.n_layer * config.n_kv_head * config.head_dim  # keys and values of one token in bf16
    context_bytes = DECODE_BATCH * kv_bytes * (RL_PROMPT_TOKENS + RL_REPLY_TOKENS / 2)
    bytes_per_decode_step = BYTES_PER_WEIGHT_READ * config.num_parameters + context_bytes
    decode_seconds = RL_REPLIES / DECODE_BATCH * RL_REPLY_TOKENS * bytes_per_decode_step / SPARK_DECODE_BANDWIDTH
    # RL also runs everything through the model without learning, for a third of the FLOPs.
    rl_flops = rl_tokens * per_token * 4 / 3 + decode_seconds * SPARK_FLOPS
    num_tokens = {"mid": MID_TOKENS, "sft": SFT_TOKENS, name: tokens}
    stages = list(STAGES)[list(STAGES).index(name) :]
    work = [
        pretraining(config, tokens) if stage == "base"
        else StageWork(stage, num_tokens[stage], num_tokens[stage] * per_token)
        for stage in stages if stage in num_tokens
    ]  # fmt: skip
    return [*work, StageWork("rl", rl_tokens, rl_flops)]


def stage_table(work: Sequence[StageWork], columns: Sequence[Machine], price_per_kwh: float | None) -> list[str]:
    """Lines with time and energy per stage and machine, the totals, and their cost if there is a price."""

    def row(name: str, tokens: str, cells: Sequence[str]) -> str:
        return f"{name:<13}{tokens:>6}" + "".join(f"{cell:>15}" for cell in cells)

    def cell(machine: Machine, *work: StageWork) -> str:
        time, kwh = format_duration(3600 * machine.hours(*work)), machine.kwh(*work)
        if kwh is None:
            return time
        return f"{time} {'<0.1' if kwh < 0.1 else format(kwh, '.1f' if kwh < 10 else ',.0f'):>4}"

    lines = [row("", "tokens", [m.name if m.watts is None else f"{m.name}, kWh" for m in columns])]
    lines += [row(stage.name, format_count(stage.tokens), [cell(m, stage) for m in columns]) for stage in work]
    lines.append(row("total", "", [cell(m, *work) for m in columns]))
    if price_per_kwh is not None:
        energy = [m.kwh(*work) for m in columns]
        costs = ["?" if kwh is None else f"{kwh * price_per_kwh:,.2f}" for kwh in energy]
        lines.append(row(f"at {price_per_kwh:g}/kWh", "", costs))
    return lines


def format_count(number: float) -> str:
    """`11.2B`, `446M`, `23M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:  # 999.9M rounds to 1,000M: print 1B
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


@dataclass
class MeasuredPlan:
    """Collects the first steps of a run, then estimates once how long the rest takes."""

    source: str  # stage of the run
    config: GPTConfig
    num_iterations: int
    tariff: Tariff = field(default_factory=Tariff.from_environment)
    steps: list[Mapping[str, float]] = field(default_factory=list)

    def step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Record the metrics of one step; return lines to print after the 20th of a long pretraining or midtraining."""
        # The steps of SFT and RL differ too much from each other.
        if self.source not in ("base", "mid") or len(self.steps) >= MEASURED_STEPS:
            return []
        self.steps.append(metrics)
        if len(self.steps) < MEASURED_STEPS:
            return []
        tokens_left = (self.num_iterations - step) * self._median("tokens")
        if tokens_left / self._median("tokens_per_second") < MIN_SECONDS_LEFT:
            return []
        machine, work = self._machine(), stages_from(self.source, self.config, tokens_left)
        table = stage_table(work, [machine], self.tariff.price_per_kwh)
        return [machine.sources[0], "estimate for the rest at that speed:", *table]

    def _machine(self) -> Machine:
        watts, power = None, ""
        if self.tariff.watts is not None:
            watts = self.tariff.watts * int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # machines, set by torchrun
            power = f", {self.tariff.watts:,.0f} W per machine, from NANOCHAT_WATTS"
        elif any("gpu_power_w" in metrics for metrics in self.steps[SKIPPED_STEPS:]):
            watts = self._median("gpu_power_w")
            power = f", {watts:,.0f} W (GPU only)"
        source = (
            f"measured over {MEASURED_STEPS - SKIPPED_STEPS} steps: {self._median('tokens_per_second'):,.0f} tokens/s, "
            f"mfu {self._median('mfu'):.3f}{power}"
        )
        return Machine("here", self._median("flops_per_second"), watts, (source,))

    def _median(self, key: str) -> float:
        return statistics.median(metrics[key] for metrics in self.steps[SKIPPED_STEPS:] if key in metrics)
