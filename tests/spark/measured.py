"""The log of a measured run of depth 20."""

from nanochat.model.gpt import GPTConfig
from nanochat.spark.plan import MeasuredPlan, flops_per_token

CONFIG = GPTConfig.from_depth(20, 65_536, 2048)
STEP = {
    "tokens": 524_288,
    "tokens_per_second": 13_000.0,
    "flops_per_second": 13_000.0 * flops_per_token(CONFIG),
    "mfu": 0.36,
    "gpu_power_w": 95.0,
}


def take_steps(plan: MeasuredPlan, first: int = 1, **changes: float) -> list[list[str]]:
    slow = {**STEP, "tokens_per_second": 100.0, "flops_per_second": 1e12, "mfu": 0.01}  # it compiles
    steps = [slow] * 2 + [{**STEP, **changes}] * 40
    return [plan.step(first + i, metrics) for i, metrics in enumerate(steps)]
