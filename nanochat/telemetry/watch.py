"""What watches over the machine while a run goes: readings for its log, warnings, the plan."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from nanochat.spark.replan import Replan
from nanochat.telemetry.alerts import Alerts
from nanochat.telemetry.sensors import Sensors
from nanochat.train.memory import checkpoint_bytes

if TYPE_CHECKING:
    from nanochat.train.loop import Training


class MachineWatch:
    """What there is to know and to say of one run's machine."""

    def __init__(self, run: "Training", num_iterations: int, energy_before: float) -> None:
        """`energy_before`: joules that earlier runs of this stage used."""
        self._sensors = Sensors(gpu_ids() if run.runtime.device.type == "cuda" else (), energy_before)
        self._alerts = Alerts(run.folder, checkpoint_bytes(run.model.config))
        self._replan = Replan(run.source, run.model.config, num_iterations, run.folder)

    def readings(self) -> dict[str, float]:
        """For metrics.jsonl: gpu_temperature_c, gpu_clock_mhz, gpu_power_w, energy_j and memory, where measured."""
        return self._sensors.readings()

    def news(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What has to be said now; `metrics` are those of the step, readings included."""
        return [*self._alerts.check(metrics, self._sensors.gpus()), *self._replan.step(step, metrics)]

    def close(self) -> None:
        """End the sensors."""
        self._sensors.close()


def gpu_ids() -> list[str]:
    """The GPUs of this machine that the run's processes use, as nvidia-smi knows them."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
