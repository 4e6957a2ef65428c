"""The web application: the chat page at /, and OpenAI's API under /v1."""

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nanochat.data.conversations import Message, Part
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.reply import add_delta
from nanochat.inference.sampling import Sampling
from nanochat.serve.guard import Guard
from nanochat.serve.protocol import ApiError, ChatCompletion, ChatRequest, delta_of, error_body, event, usage_of
from nanochat.serve.worker import GenerationError, ModelWorker, QueueFullError, Reply

STATIC = Path(__file__).parent / "static"
MAX_BODY_BYTES = 1_000_000
Result = TypeVar("Result")


def create_app(
    chat_model: ChatModel,
    *,
    defaults: Sampling | None = None,
    max_waiting: int = 16,
    allowed_hosts: list[str] | None = None,
) -> FastAPI:
    """The server for one model, which it uses from a thread of its own from now until the app shuts down.

    defaults: sampling where a request does not say; its seed is not used, each request draws one.
    max_waiting: requests that may wait behind the one being answered; more are refused with status 429.
    allowed_hosts: names the browser may have called this server by; None allows all.
    """
    defaults = defaults or Sampling()
    worker = ModelWorker(chat_model, max_waiting)
    model_id = f"nanochat-{chat_model.model_tag}-{chat_model.source}"

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    # FastAPI's own documentation pages load their script from another host, so they are off.
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, max_body_bytes=MAX_BODY_BYTES, allowed_hosts=allowed_hosts)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _speak_openai_errors(app)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server is well, which model talks, and how busy it is."""
        return {
            "status": "ok",
            "model": model_id,
            "description": chat_model.description,
            "running": worker.running,
            "waiting": worker.waiting,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model there is, with the sampling it uses where a request does not say."""
        about = {
            "source": chat_model.source,
            "model_tag": chat_model.model_tag,
            "step": chat_model.step,
            "description": chat_model.description,
            "context": chat_model.context,
            "defaults": {
                "temperature": defaults.temperature,
                "top_k": defaults.top_k,
                "max_tokens": defaults.max_tokens,
            },
        }
        card = {"id": model_id, "object": "model", "created": 0, "owned_by": "nanochat", "nanochat": about}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream of server-sent events."""
        if body.model not in (None, model_id):
            raise ApiError(
                404, f"there is no model {body.model!r}: use {model_id!r}", code="model_not_found", param="model"
            )
        messages = body.conversation()
        prompt_tokens = await asyncio.to_thread(_count_prompt, chat_model, messages)
        sampling = _sampling(body, defaults)
        try:
            reply = worker.submit(messages, sampling)
        except QueueFullError:
            raise ApiError(429, "too many requests are waiting: try again in a moment", code="queue_full") from None
        answer = _Answer(reply, ChatCompletion(model_id), prompt_tokens)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return _Stream(answer.events(with_usage), reply)
        try:
            return JSONResponse(await _unless_gone(request, answer.whole()))
        finally:
            reply.cancel()

    return app


class _Stream(StreamingResponse):
    """Server-sent events; when they end, or the client leaves, the model turns to the next request."""

    def __init__(self, events: AsyncIterator[str], reply: Reply) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


class _Answer:
    """A reply on its way to the client, with what has to be said about it at its end."""

    def __init__(self, reply: Reply, completion: ChatCompletion, prompt_tokens: int) -> None:
        self.reply = reply
        self.completion = completion
        self.prompt_tokens = prompt_tokens

    async def whole(self) -> dict[str, Any]:
        parts: list[Part] = []
        async for delta in self.reply:
            add_delta(parts, delta)
        reason, usage = self._outcome()
        return self.completion.whole(parts, reason, usage)

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        try:
            yield event(self.completion.chunk({"role": "assistant", "content": ""}))
            async for delta in self.reply:
                yield event(self.completion.chunk(delta_of(delta.type, delta.text)))
            reason, usage = self._outcome()
            yield event(self.completion.chunk({}, reason))
            if with_usage:
                yield event(self.completion.usage_chunk(usage))
        except UserError as error:
            yield event(error_body(400, str(error)))
        except GenerationError as error:
            yield event(error_body(500, str(error)))
        yield event("[DONE]")

    def _outcome(self) -> tuple[str, dict[str, int]]:
        """finish_reason and usage; a tool's output counts as written, since it takes room in the context too."""
        completion = self.reply.completion
        if completion is None:  # cancelled while it waited
            return "stop", usage_of(self.prompt_tokens, 0)
        return completion.finish_reason or "stop", usage_of(self.prompt_tokens, len(completion.tokens))


def _sampling(body: ChatRequest, defaults: Sampling) -> Sampling:
    """What the request asks for, and our defaults where it does not say."""
    top_k = body.top_k if "top_k" in body.model_fields_set else defaults.top_k
    return dataclasses.replace(
        defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens or defaults.max_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=top_k or None,
        seed=secrets.randbits(31) if body.seed is None else body.seed % 2**31,
    )


def _count_prompt(chat_model: ChatModel, messages: list[Message]) -> int:
    """Tokens of the prompt. Raises ApiError if no room is left in the context for an answer."""
    try:
        count = len(chat_model.prompt(messages))
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    if count >= chat_model.context:
        raise ApiError(
            400,
            f"this conversation is {count} tokens long and the model reads at most {chat_model.context}: shorten it",
            code="context_length_exceeded",
            param="messages",
        )
    return count


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client hangs up first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


def _speak_openai_errors(app: FastAPI) -> None:
    """Every refusal in OpenAI's shape, and none with status 422."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

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

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server failed to answer"), 500)
