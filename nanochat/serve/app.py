"""The web application: the chat page at /, the OpenAI-compatible API under /v1, health and metrics."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.errors import UserError
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve import anthropic, api, ollama, openai_responses
from nanochat.serve.errors import ApiError, to_api_error
from nanochat.serve.generation import DROPPED_HEADER, ReplyGenerator
from nanochat.serve.markdown import code_css
from nanochat.serve.metrics import Metrics
from nanochat.serve.middleware import SecurityMiddleware
from nanochat.serve.pool import EnginePool
from nanochat.serve.protocol import RenderRequest
from nanochat.serve.renderer import Renderer
from nanochat.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"


def create_app(
    pool: EnginePool,
    tokenizer: Tokenizer,
    *,
    defaults: SamplingParams | None = None,
    allowed_hosts: list[str] | None = None,
    allowed_origins: list[str] | None = None,
    api_key: str | None = None,
    on_loaded: Callable[[UserError | None], None] = lambda error: None,
) -> FastAPI:
    """Create the application. Its engines start loading the model at startup and stop at shutdown.

    defaults: sampling parameters that requests can override (the seed is always random).
    allowed_hosts: accepted Host headers; None: all.
    allowed_origins: CORS origins.
    api_key: required by all routes but the page and /health.
    on_loaded: called when the engines have loaded the model, or with the error.
    """
    metrics = Metrics(pool)
    renderer = Renderer()

    async def report_loaded() -> None:
        try:
            await pool.wait_until_loaded()
        except UserError as error:
            on_loaded(error)
        else:
            on_loaded(None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        task = asyncio.create_task(report_loaded())
        yield
        task.cancel()
        await renderer.close()
        await pool.close()

    # FastAPI's documentation pages are off because they load scripts from another host.
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(SecurityMiddleware, metrics=metrics, allowed_hosts=allowed_hosts, api_key=api_key)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's browser client sends a dozen headers
            expose_headers=[DROPPED_HEADER, "Retry-After"],
        )
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    generator = ReplyGenerator(pool, tokenizer, defaults or SamplingParams(), metrics)
    for protocol in (api, openai_responses, anthropic, ollama):
        app.include_router(protocol.routes(generator))

    async def respond_to_error(request: Request, error: Exception) -> Response:
        return to_api_error(error).response_to(request.url.path)

    # SecurityMiddleware handles all others, which are unexpected.
    for error_type in (ApiError, UserError, HTTPException, RequestValidationError, ValidationError, RecursionError):
        app.add_exception_handler(error_type, respond_to_error)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", background=BackgroundTask(renderer.render, [""]))

    @app.get("/code.css", include_in_schema=False)
    async def syntax_colors() -> Response:
        return Response(code_css(), media_type="text/css")

    @app.post("/render")
    async def render(body: RenderRequest) -> dict[str, list[str]]:
        """Convert Markdown to HTML for the page."""
        return {"html": await renderer.render(body.texts)}

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        """Return the server's status and model; status code 503 unless an engine can reply."""
        status, engines = pool.status, [engine.status for engine in pool.engines]
        if status != "ok":
            response.status_code = 503
            return {"status": status, "ready": False, "engines": engines}
        loaded = next(engine.loaded for engine in pool.engines if engine.loaded)
        return {
            "status": status,
            "ready": True,
            "model": loaded.id,
            "description": loaded.description,
            "running": pool.running,
            "waiting": pool.waiting,
            "engines": engines,
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app
