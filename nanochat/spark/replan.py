"""The plan told anew, from what a run has measured of its own machine in its first steps."""

import contextlib
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.model.gpt import GPTConfig
from nanochat.spark.plan import Machine, Stage, flops_per_token, stages
from nanochat.spark.plan_table import stage_table
from nanochat.spark.tariff import Tariff

MEASURED_STEPS = 20
SKIPPED_STEPS = 3
"""The first ones compile."""
WORTH_TELLING_SECONDS = 3600.0
"""Time left in the stage under which there is nothing to plan."""
STAGES = {"base": "pretrain", "mid": "midtrain"}
"""The stages whose steps are all alike, by what their checkpoints are called."""
FILE = "plan.json"
FLOPS_PER_BYTE = 125e12 * 0.4 / (273e9 * 0.5)
"""Of a GB10 in training, against its memory while it writes replies: RL's share of the plan elsewhere is a guess."""


@dataclass(frozen=True)
class PlannedStage:
    """What a stage, or what was left of it, would take."""

    name: str
    """as in the plan: pretrain, midtrain, sft or rl"""
    hours: float
    kwh: float | None


@dataclass(frozen=True)
class Plan:
    """What a run kept of its plan."""

    machine: Machine
    """as measured"""
    step: int
    """after which it was made"""
    stages: tuple[PlannedStage, ...]
    """what was left of the run's own stage, and those to come"""


class Replan:
    """Collects the first steps of a run, and then says once how long everything will take."""

    def __init__(self, source: str, config: GPTConfig, num_iterations: int, folder: Path) -> None:
        """`source`: base, mid, sft or rl; `folder`: where the run keeps its files, FILE among them.

        Raises UserError if the user's word on power or its price is no number: now, and not after twenty steps.
        """
        self._tariff = Tariff.from_environment()
        self._source = source
        self._config = config
        self._num_iterations = num_iterations
        self._folder = folder
        self._steps: list[Mapping[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take the metrics of one step; lines to print after the twentieth of a long run of text or conversations."""
        if step == 1:  # what another run left here, which was killed before it saved, is no plan of this one
            (self._folder / FILE).unlink(missing_ok=True)
        if self._source not in STAGES or len(self._steps) >= MEASURED_STEPS:
            return []
        self._steps.append(metrics)
        if len(self._steps) < MEASURED_STEPS:
            return []
        measured = self._steps[SKIPPED_STEPS:]
        tokens_per_second = _median("tokens_per_second", measured)
        tokens_left = (self._num_iterations - step) * _median("tokens", measured)
        if tokens_left / tokens_per_second < WORTH_TELLING_SECONDS:
            return []
        return self._tell(step, measured, tokens_per_second, tokens_left)

    def _tell(
        self, step: int, measured: list[Mapping[str, float]], tokens_per_second: float, tokens_left: float
    ) -> list[str]:
        with_power = [step for step in measured if "gpu_power_w" in step]
        watts, whose = None, ""
        if self._tariff.watts is not None:
            watts = self._tariff.watts * int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # torchrun's number of machines
            whose = f", {self._tariff.watts:,.0f} W for each machine, as NANOCHAT_WATTS says"
        elif with_power:
            watts = _median("gpu_power_w", with_power)
            whose = f", {watts:,.0f} W by the GPU alone"
        mfu = _median("mfu", measured)
        told = f"measured over {len(measured)} steps: {tokens_per_second:,.0f} tokens/s, mfu {mfu:.3f}{whose}"
        per_token = flops_per_token(self._config)
        flops = _median("flops_per_second", measured)
        machine = Machine("here", flops, flops / FLOPS_PER_BYTE, watts, (told,))
        planned = {stage.name: stage for stage in stages(self._config, tokens_left)}
        current = STAGES[self._source]
        left = Stage(current, tokens_left, tokens_left * per_token)
        names = list(planned)
        ahead = [left, *(planned[name] for name in names[names.index(current) + 1 :])]
        save(self._folder / FILE, machine, step, ahead, mfu)
        return [told, "what is left at that speed:", *stage_table(ahead, [machine], self._tariff.price_per_kwh)]


def save(path: Path, machine: Machine, step: int, ahead: list[Stage], mfu: float) -> None:
    """Keep it for nanochat.sh plan and the report."""
    plan = {
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
        "watts": machine.watts,
        "mfu": mfu,
        "source": machine.sources[0],
        "step": step,
        "stages": [
            {"name": stage.name, "tokens": stage.tokens, "hours": machine.hours(stage), "kwh": machine.kwh(stage)}
            for stage in ahead
        ],
    }
    with contextlib.suppress(OSError):  # a full disk is the alerts' to tell; the table is printed
        path.write_text(json.dumps(plan, indent=2) + "\n")


def read(path: Path) -> Plan | None:
    """The plan that a run kept; None where none did, or the file is damaged."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        flops, bandwidth, watts = float(kept["flops"]), float(kept["bandwidth"]), _float_or_none(kept["watts"])
        if not (flops > 0 and bandwidth > 0):
            return None
        machine = Machine("here", flops, bandwidth, watts, (str(kept["source"]),))
        ahead = (
            PlannedStage(str(stage["name"]), float(stage["hours"]), _float_or_none(stage["kwh"]))
            for stage in kept["stages"]
        )
        return Plan(machine, int(kept["step"]), tuple(ahead))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _float_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _median(name: str, steps: list[Mapping[str, float]]) -> float:
    return statistics.median(step[name] for step in steps)
