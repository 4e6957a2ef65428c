"""The OpenAI-compatible API: https://platform.openai.com/docs/api-reference/chat."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.inference import chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.engine_process import Prompts, RequestOutput
from nanochat.serve.metrics import Metrics
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.pool import EnginePool, ReplyStream
from nanochat.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    TokenizeRequest,
    to_conversation,
    truncate_conversation,
)
from nanochat.serve.responses import ChatResponseBuilder, Json, ResponseBuilder, TextResponseBuilder, sse_event
from nanochat.tokenizer import Tokenizer

DROPPED_HEADER = "X-Nanochat-Dropped-Messages"  # number of oldest messages that did not fit in the context
MAX_RESPONSE_LOGPROBS = 100_000  # converting this many to JSON takes 0.4 s of CPU time


def routes(pool: EnginePool, tokenizer: Tokenizer, defaults: SamplingParams, metrics: Metrics) -> APIRouter:
    """Create the routes under /v1, /tokenize and /stats."""
    router = APIRouter()

    def find_model(name: str | None) -> ModelCard:
        card = pool.registry.find(name)
        if card is None:
            message = f"model {name!r} does not exist: GET /v1/models lists all models"
            raise ApiError(404, message, code="model_not_found", param="model")
        return card

    async def respond(
        card: ModelCard,
        prompts: Prompts,
        builder: ResponseBuilder,
        body: SamplingRequest,
        request: Request,
        headers: dict[str, str] | None = None,
    ) -> Response:
        _check_logprobs([sampling for _, sampling in prompts], card.context)
        replies = pool.submit(card, prompts)
        outputs = _measured(replies, metrics)
        if body.stream:
            return _EventStream(_events(outputs, builder, replies), replies, headers)

        async def collect() -> Response:
            collected: list[list[RequestOutput]] = [[] for _ in prompts]
            async for index, output in outputs:
                collected[index].append(output)
            num_tokens = sum(replies.tokens)
            # In a thread, because many logprobs take long enough to delay the other streams.
            return await asyncio.to_thread(
                lambda: JSONResponse(builder.response(collected, num_tokens), headers=headers)
            )

        try:
            return await _cancel_on_disconnect(request, collect())
        finally:
            replies.cancel()

    @router.get("/v1/models")
    def models() -> Json:
        """List the trained models and their default sampling parameters."""
        return {"object": "list", "data": [_model_object(card, pool, defaults) for card in pool.registry.cards()]}

    @router.get("/v1/models/{name}")
    def model(name: str) -> Json:
        """Describe one model."""
        return _model_object(find_model(name), pool, defaults)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation, in one response or as a stream of server-sent events."""
        card = await asyncio.to_thread(find_model, body.model)
        samplings = body.sampling_params(defaults)
        prompt, dropped = await asyncio.to_thread(
            truncate_conversation,
            lambda messages: chat.prompt_tokens(tokenizer, card.source, messages),
            to_conversation(body.messages),
            card.context,
            samplings[0].max_tokens,
        )
        prompts = [(prompt, own) for own in samplings]
        builder = ChatResponseBuilder(card.id, tokenizer, body.include_usage, len(prompt), len(prompts))
        headers = {DROPPED_HEADER: str(dropped)} if dropped else None
        return await respond(card, prompts, builder, body, request, headers)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text or tokens, without the chat format."""
        card = await asyncio.to_thread(find_model, body.model)
        encoded = [await asyncio.to_thread(_encode, prompt, tokenizer, card.context) for prompt in body.prompts()]
        samplings = body.sampling_params(defaults)
        prompts = [(prompt, own) for prompt in encoded for own in samplings]
        echo = [tokenizer.decode(prompt[1:]) if body.echo else "" for prompt, _ in prompts]
        builder = TextResponseBuilder(card.id, tokenizer, body.include_usage, sum(map(len, encoded)), echo)
        return await respond(card, prompts, builder, body, request)

    @router.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> Json:
        """Tokenize a text, or a conversation in the chat format."""
        card = find_model(body.model)
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "exactly one of text and messages is required")
        if body.messages is not None:
            tokens = chat.prompt_tokens(tokenizer, card.source, to_conversation(body.messages))
        else:
            tokens = tokenizer.encode(body.text or "")
        return {"count": len(tokens), "tokens": tokens, "max_model_len": card.context}

    @router.get("/stats")
    async def stats() -> Json:
        """Return model, load and totals of each engine. Names of the counts as in karpathy/nanochat."""
        engines = [
            {
                "gpu_id": engine.gpu or 0,
                "model": engine.loaded.id if engine.loaded else None,
                "replies": len(engine.replies),
                "engine": asdict(engine.stats) if engine.stats else None,
            }
            for engine in pool.engines
        ]
        busy = sum(bool(engine.replies) for engine in pool.engines)
        return {
            "total_workers": len(engines),
            "busy_workers": busy,
            "available_workers": len(engines) - busy,
            "running": pool.running,
            "waiting": pool.waiting,
            "workers": engines,
        }

    return router


async def _measured(replies: ReplyStream, metrics: Metrics) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Pass on the outputs and record latency and speed of each reply."""
    start = time.monotonic()
    first: dict[int, tuple[float, int]] = {}
    async for index, output in replies:
        now = time.monotonic()
        if index not in first:
            first[index] = (now, output.num_tokens)
            metrics.first_token.observe(now - start)
        first_time, first_tokens = first[index]
        if output.finish_reason and now > first_time and output.num_tokens > first_tokens:
            metrics.speed.observe((output.num_tokens - first_tokens) / (now - first_time))
        yield index, output


async def _events(
    outputs: AsyncIterator[tuple[int, RequestOutput]], builder: ResponseBuilder, replies: ReplyStream
) -> AsyncIterator[str]:
    try:
        for chunk in builder.opening_chunks():
            yield sse_event(chunk)
        async for index, output in outputs:
            yield "".join(sse_event(chunk) for chunk in builder.chunks(index, output))
        if builder.include_usage:
            yield sse_event(builder.usage_chunk(sum(replies.tokens)))
    except ApiError as error:
        yield sse_event(error.body)
    yield sse_event("[DONE]")


class _EventStream(StreamingResponse):
    """Server-sent events. Unfinished replies are cancelled when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], replies: ReplyStream, headers: dict[str, str] | None) -> None:
        # X-Accel-Buffering: nginx would otherwise buffer the stream.
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no", **(headers or {})})
        self.replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.replies.cancel()


def _model_object(card: ModelCard, pool: EnginePool, defaults: SamplingParams) -> Json:
    details = {
        **asdict(card),
        "description": card.description,
        "default": card == pool.registry.default,
        "loaded": any(engine.loaded == card for engine in pool.engines),
        "defaults": {
            name: getattr(defaults, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
        },
    }
    return {"id": card.id, "object": "model", "created": card.created, "owned_by": "nanochat", "nanochat": details}


def _check_logprobs(samplings: list[SamplingParams], context: int) -> None:
    count = sum(min(s.max_tokens, context) * (1 + s.logprobs) for s in samplings if s.logprobs is not None)
    if count > MAX_RESPONSE_LOGPROBS:
        message = f"logprobs per response must be at most {MAX_RESPONSE_LOGPROBS}, got {count}: lower max_tokens or n"
        raise ApiError(400, message, param="logprobs")


def _encode(prompt: str | list[int], tokenizer: Tokenizer, context: int) -> list[int]:
    """Encode a prompt, starting with <|bos|>. Raises ApiError if it fills the context or has invalid token ids."""
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not all(0 <= token < tokenizer.vocab_size for token in tokens):
        raise ApiError(400, f"token ids must be between 0 and {tokenizer.vocab_size - 1}", param="prompt")
    if tokens[:1] != [tokenizer.bos_id]:
        tokens = [tokenizer.bos_id, *tokens]
    if len(tokens) >= context:
        message = f"the prompt has {len(tokens)} tokens, but the model's context is {context}: shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param="prompt")
    return tokens


async def _cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Await `work`, but cancel it if the client disconnects first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
