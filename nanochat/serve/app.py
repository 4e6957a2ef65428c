"""The web application: the chat page at /, OpenAI's API under /v1, and what tells how the server is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.errors import UserError
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve import api
from nanochat.serve.guard import Guard
from nanochat.serve.metrics import Counted, Metrics
from nanochat.serve.pool import Pool
from nanochat.serve.protocol import ApiError, RenderRequest, error_body
from nanochat.serve.render import code_css, to_html
from nanochat.serve.worker import GenerationError
from nanochat.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"
MAX_BODY_BYTES = 1_000_000


def create_app(
    pool: Pool,
    tokenizer: Tokenizer,
    *,
    defaults: SamplingParams | None = None,
    allowed_hosts: list[str] | None = None,
    allowed_origins: list[str] | None = None,
    api_key: str | None = None,
    on_loaded: Callable[[UserError | None], None] = lambda problem: None,
) -> FastAPI:
    """The server. Its engines load the model when it starts and end with it.

    defaults: sampling where a request does not say; its seed is not used, each request draws one.
    allowed_hosts: names the browser may have called this server by; None allows all.
    allowed_origins: pages of other servers that may use the API in a browser; by default none.
    api_key: what every request must bring, but those for the page itself and for /health.
    on_loaded: told once the engines have their model, or why they cannot have it.
    """
    metrics = Metrics(pool)
    rendering = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def watch() -> None:
            try:
                await pool.loaded()
            except UserError as error:
                on_loaded(error)
            else:
                on_loaded(None)

        pool.start()
        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await pool.close()

    # FastAPI's own documentation pages load their script from another host, so they are off.
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, max_body_bytes=MAX_BODY_BYTES, allowed_hosts=allowed_hosts, api_key=api_key)
    app.add_middleware(Counted, metrics=metrics)  # around the guard, whose own answers count too
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=[api.DROPPED_HEADER, "Retry-After"],
        )
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.include_router(api.routes(pool, tokenizer, defaults or SamplingParams(), metrics))
    _speak_openai_errors(app)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/code.css", include_in_schema=False)
    async def colours_of_code() -> Response:
        return Response(code_css(), media_type="text/css")

    @app.post("/render")
    async def render(body: RenderRequest) -> dict[str, list[str]]:
        """Markdown as HTML, for the page."""
        async with rendering:  # one at a time: it is processor time, which the streams need too
            return {"html": await asyncio.to_thread(lambda: [to_html(text) for text in body.texts])}

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        """Whether the server is well and which model talks; status 503 while the model is being loaded."""
        loaded = [worker.loaded for worker in pool.workers if worker.loaded]
        if not loaded:
            response.status_code = 503
            return {"status": "loading", "ready": False}
        return {
            "status": "ok",
            "ready": True,
            "model": loaded[0].id,
            "description": loaded[0].description,
            "running": pool.running,
            "waiting": pool.waiting,
        }

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """Each engine: its model, how busy it is, what it has done since the model was loaded."""
        return api.stats(pool)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """The same and the replies' times, in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _speak_openai_errors(app: FastAPI) -> None:
    """Every refusal in OpenAI's shape, and none with status 422; Guard answers for what no route expected."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(UserError)
    async def unfit(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error)), 400)

    @app.exception_handler(GenerationError)
    async def broken_down(request: Request, error: GenerationError) -> JSONResponse:
        return JSONResponse(error_body(500, str(error)), 500)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Only the place and the complaint: the value could be the user's text, or not be JSON at all.
        first = error.errors()[0]
        param = ".".join(str(step) for step in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return JSONResponse(error_body(400, message, code="invalid_value", param=param), 400)
