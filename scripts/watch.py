"""Watch a run from another terminal, or over the network.

./nanochat.sh watch
./nanochat.sh watch --web --host 0.0.0.0
"""

import contextlib
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from nanochat import cli
from nanochat.report import build, live, web
from nanochat.serve import http_server

SECONDS_BETWEEN_LOOKS = 2.0


@dataclass
class WatchOptions:
    """Show how the run stands that is going on, or the last one. Ctrl-C ends the watching, not the run."""

    model_tag: str | None = None
    """which model; by default the one that was trained last"""
    web: bool = False
    """serve the report as a page that keeps itself up to date, instead of a screen in this terminal"""
    host: str = "127.0.0.1"
    """of the page; 0.0.0.0 lets other machines in"""
    port: int = 8001
    """of the page"""


def main(options: WatchOptions) -> None:
    if options.web:
        serve(options)
        return
    console = Console()
    if not console.is_terminal:
        console.print(live.screen(build.stages_to_report(options.model_tag), time.time()))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as shown:
        while True:
            shown.update(live.screen(build.stages_to_report(options.model_tag), time.time()), refresh=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)


def serve(options: WatchOptions) -> None:
    listener = http_server.bind(options.host, options.port)
    print(f"the report is at {http_server.url(listener, options.host)} (Ctrl-C stops)", flush=True)
    if not http_server.is_loopback(listener):
        print("warning: everyone who can reach this machine over the network can read it", flush=True)
    app = web.create_app(options.model_tag, http_server.allowed_hosts(listener, options.host))
    http_server.Server().run(app, listener)


if __name__ == "__main__":
    cli.run(main, WatchOptions, demo=WatchOptions())
