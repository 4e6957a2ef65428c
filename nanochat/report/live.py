"""A run that is going on, on a screen of the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanochat.report.history import Stage
from nanochat.report.plots import thinned
from nanochat.units import format_duration

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
CURVES = {
    "loss": "loss",
    "bpb": "bits per byte",
    "reward": "reward",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "gradient_norm": "gradient norm",
}
"""What is shown of a run, by its key in metrics.jsonl."""
RECENT_STEPS = 20
"""that the time left is worked out from"""


def screen(stages: Sequence[Stage], now: float) -> RenderableType:
    """How the last stage stands, 80 columns wide at most. `now`: time.time()."""
    stage = stages[-1]
    planned = stage.facts["num_iterations"]
    curves = Table.grid(padding=(0, 2))
    for key, title in CURVES.items():
        values = stage.series(key)[1]
        if values:
            curves.add_row(title, Text(sparkline(values), style="cyan"), f"{values[-1]:,.4g}")
    samples = stage.samples[-1] if stage.samples else None
    written = (
        [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in samples["samples"]] if samples else []
    )
    return Group(
        Text(f"{' → '.join(s.source for s in stages)}  {stage.facts['tag']} on {stage.facts['machine']}", style="bold"),
        Text(f"step {stage.step:,} of {planned:,}, {_state(stage, now)}"),
        ProgressBar(total=planned, completed=stage.step, width=78),
        Text(),
        curves,
        *([Text(), Text(f"at step {samples['step']:,} it wrote:")] if samples else []),
        *written,
    )


def _state(stage: Stage, now: float) -> str:
    if stage.is_finished:
        return f"finished in {format_duration(stage.seconds)}"
    last = f"the last one {format_duration(now - stage.logged_at)} ago"
    recent = stage.rows[-RECENT_STEPS:]
    if len(recent) < 2:
        return last
    a_step = (recent[-1]["seconds"] - recent[0]["seconds"]) / (len(recent) - 1)
    left = a_step * (stage.facts["num_iterations"] - stage.step)
    return f"{last}, {format_duration(left)} left at {a_step:.2f} s a step"


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A curve in one line of text: means of neighbouring values, from the lowest to the highest block."""
    means = thinned(range(len(values)), values, width)[1]
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low or 1.0) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[round(float(height))] for height in heights)
