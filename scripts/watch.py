"""Follow a run in another terminal or in the browser.

./nanochat.sh watch
./nanochat.sh watch --web --host 0.0.0.0
"""

import contextlib
import time
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live

from nanochat import cli
from nanochat.report import watch
from nanochat.report.history import newest_stages
from nanochat.serve import http_server

SECONDS_BETWEEN_UPDATES = 2.0


@dataclass
class WatchOptions:
    """Show the progress of the current or last run. Ctrl-C stops watching, not the run."""

    model_tag: str | None = None
    """model; default: the one trained last"""
    web: bool = False
    """serve the report as a live web page instead of showing a screen in this terminal"""
    host: str = "127.0.0.1"
    """address of the page; 0.0.0.0 makes it reachable from other machines"""
    port: int = 8001
    """port of the page"""


def main(options: WatchOptions) -> None:
    if options.web:
        serve(options)
        return

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


def serve(options: WatchOptions) -> None:
    listener = http_server.bind(options.host, options.port)
    print(f"Serving the report at {http_server.url(listener, options.host)} (Ctrl-C to stop)", flush=True)
    if not http_server.is_loopback(listener):
        print("warning: anyone who can reach this machine over the network can read the report", flush=True)
    app = watch.create_app(options.model_tag, http_server.allowed_hosts(listener, options.host))
    http_server.Server(app).run_on(listener)


if __name__ == "__main__":
    cli.run(main, WatchOptions, demo=WatchOptions())
