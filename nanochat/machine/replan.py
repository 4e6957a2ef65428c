"""The plan told anew, from what a run has measured of its own machine in its first steps."""

import contextlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.gpt import GPTConfig
from nanochat.machine.plan import Machine, Stage, flops_per_token, stages
from nanochat.machine.plan_table import stage_table
from nanochat.machine.tariff import Tariff

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
        return self._tell(measured, tokens_per_second, tokens_left)

    def _tell(self, measured: list[Mapping[str, float]], tokens_per_second: float, tokens_left: float) -> list[str]:
        with_power = [step for step in measured if "gpu_power_w" in step]
        watts = self._tariff.watts
        if watts is None and with_power:
            watts = _median("gpu_power_w", with_power)
        mfu = _median("mfu", measured)
        told = f"measured over {len(measured)} steps: {tokens_per_second:,.0f} tokens/s, mfu {mfu:.3f}"
        if watts is not None:
            told += f", {watts:,.0f} W {'by the GPU alone' if self._tariff.watts is None else 'as NANOCHAT_WATTS says'}"
        per_token = flops_per_token(self._config)
        flops = _median("flops_per_second", measured)
        machine = Machine("here", flops, flops / FLOPS_PER_BYTE, watts, (told,))
        planned = {stage.name: stage for stage in stages(self._config, tokens_left)}
        current = STAGES[self._source]
        left = Stage(current, tokens_left, tokens_left * per_token)
        names = list(planned)
        ahead = [left, *(planned[name] for name in names[names.index(current) + 1 :])]
        save(self._folder / FILE, machine, ahead, mfu)
        return [told, "what is left at that speed:", *stage_table(ahead, [machine], self._tariff.price_per_kwh)]


def save(path: Path, machine: Machine, ahead: list[Stage], mfu: float) -> None:
    """Keep it for plan.sh."""
    plan = {
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
        "watts": machine.watts,
        "mfu": mfu,
        "source": machine.sources[0],
        "stages": [
            {"name": stage.name, "tokens": stage.tokens, "hours": machine.hours(stage), "kwh": machine.kwh(stage)}
            for stage in ahead
        ],
    }
    with contextlib.suppress(OSError):  # a full disk is the alerts' to tell; the table is printed
        path.write_text(json.dumps(plan, indent=2) + "\n")


def read(path: Path) -> Machine | None:
    """The machine that a run measured; None where none did, or the file is damaged."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        flops, bandwidth, watts = float(plan["flops"]), float(plan["bandwidth"]), plan["watts"]
        if not (flops > 0 and bandwidth > 0):
            return None
        return Machine("here", flops, bandwidth, None if watts is None else float(watts), (str(plan["source"]),))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _median(name: str, steps: list[Mapping[str, float]]) -> float:
    return statistics.median(step[name] for step in steps)
