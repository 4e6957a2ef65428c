"""Follow a run in another terminal.

./nanochat.sh watch
"""

import contextlib
import time
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live

from nanochat import cli
from nanochat.report import watch
from nanochat.report.history import newest_stages

SECONDS_BETWEEN_UPDATES = 2.0


@dataclass
class WatchOptions:
    """Show the progress of the current or last run. Ctrl-C stops watching, not the run."""

    model_tag: str | None = None
    """model; default: the one trained last"""


def main(options: WatchOptions) -> None:
    def screen() -> RenderableType:
        return watch.screen(newest_stages(options.model_tag), time.time())

    console = Console()
    if not console.is_terminal:
        console.print(screen())
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as shown:
        while True:
            shown.update(screen(), refresh=True)
            time.sleep(SECONDS_BETWEEN_UPDATES)


if __name__ == "__main__":
    cli.run(main, WatchOptions, demo=WatchOptions())
