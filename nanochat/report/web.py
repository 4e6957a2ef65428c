"""The report as a page on the network, up to date with a run that is going on."""

import html
import threading
import time
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanochat.errors import UserError
from nanochat.report import build
from nanochat.spark.plan import Tariff

REFRESH_SECONDS = 20
"""between two loads of the page"""
MOST_WORK = 0.05
"""of one core's time that drawing may take from the run"""


class LivePage:
    """The newest report, made again when it is asked for, but not so often that the run would feel it."""

    def __init__(self, model_tag: str | None) -> None:
        """Of `model_tag`, or of the model that was trained last."""
        self.model_tag = model_tag
        self._lock = threading.Lock()
        self._page = ""
        self._fresh_until = 0.0

    def html(self) -> str:
        """The page."""
        with self._lock:
            begun = time.monotonic()
            if begun >= self._fresh_until:
                self._page = self._make()
                finished = time.monotonic()
                self._fresh_until = finished + (finished - begun) / MOST_WORK
            return self._page

    def _make(self) -> str:
        try:
            stages = build.stages_to_report(self.model_tag)
            return build.page(stages, build.draw(stages), Tariff.from_environment(), REFRESH_SECONDS)
        except UserError as error:
            return f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"><p>{html.escape(str(error))}</p>'


def create_app(model_tag: str | None, allowed_hosts: Sequence[str] | None) -> FastAPI:
    """A server of one page. `allowed_hosts`: what a browser may call it by, None for anything."""
    page = LivePage(model_tag)
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts or ["*"])  # against DNS rebinding

    @app.get("/")
    def report() -> HTMLResponse:
        return HTMLResponse(page.html(), headers={"Cache-Control": "no-cache"})

    return app
