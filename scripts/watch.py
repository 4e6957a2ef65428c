"""Follow a run in another terminal.

./nanochat.sh watch
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanochat import cli
from nanochat.report.history import Stage, newest_stages
from nanochat.report.plots import downsample
from nanochat.units import format_duration, printable

SECONDS_BETWEEN_UPDATES = 2.0
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
CURVES = {  # on the screen, by key in metrics.jsonl
    "loss": "loss", "bpb": "bits per byte", "reward": "reward", "tokens_per_second": "tokens/s", "mfu": "MFU",
    "gradient_norm": "gradient norm",
}  # fmt: skip
RECENT_STEPS = 20  # steps that the remaining time is estimated from


@dataclass
class WatchOptions:
    """Show the progress of the current or last run. Ctrl-C stops watching, not the run."""

    model_tag: str | None = None
    """model; default: the one trained last"""


def main(options: WatchOptions) -> None:
    console = Console()
    if not console.is_terminal:
        console.print(screen(newest_stages(options.model_tag), time.time()))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as shown:
        while True:
            shown.update(screen(newest_stages(options.model_tag), time.time()), refresh=True)
            time.sleep(SECONDS_BETWEEN_UPDATES)


def screen(stages: Sequence[Stage], now: float) -> RenderableType:
    """The last stage in at most 80 columns. `now`: time.time()."""
    stage = stages[-1]
    planned = stage.facts["num_iterations"]
    curves = Table.grid(padding=(0, 2))
    for key, title in CURVES.items():
        values = stage.series(key)[1]
        if values:
            curves.add_row(title, Text(sparkline(values), style="cyan"), f"{values[-1]:,.4g}")
    title = f"{' → '.join(s.source for s in stages)}  {stage.facts['tag']} on {stage.facts['machine']}"
    lines: list[RenderableType] = [
        Text(printable(title), style="bold"),
        Text(f"step {stage.step:,} of {planned:,}, {_progress(stage, now)}"),
        ProgressBar(total=planned, completed=stage.step, width=78),
        Text(),
        curves,
    ]
    if stage.samples:
        lines += [Text(), Text(f"sample at step {stage.samples[-1]['step']:,}:")]
        written = stage.samples[-1]["samples"]
        lines += [Text(printable(line), style="dim", no_wrap=True, overflow="ellipsis") for line in written]
    return Group(*lines)


def _progress(stage: Stage, now: float) -> str:
    if stage.is_finished:
        return f"finished in {format_duration(stage.seconds)}"
    last = f"last one {format_duration(now - stage.logged_at)} ago"
    recent = stage.rows[-RECENT_STEPS:]
    if len(recent) < 2:
        return last
    per_step = (recent[-1]["seconds"] - recent[0]["seconds"]) / (len(recent) - 1)
    left = per_step * (stage.facts["num_iterations"] - stage.step)
    return f"{last}, {format_duration(left)} left at {per_step:.2f} s/step"


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A curve in one line of text, from its minimum (lowest block) to its maximum (full block)."""
    means = downsample(range(len(values)), values, width)[1]
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low or 1.0) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[round(float(height))] for height in heights)


if __name__ == "__main__":
    cli.run(main, WatchOptions, demo=WatchOptions())
