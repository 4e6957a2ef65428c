"""OpenAI's API: https://platform.openai.com/docs/api-reference/chat, and the stream of the first nanochat."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.inference import chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.completions import ChatWriter, Json, TextWriter, Writer, event, usage_of
from nanochat.serve.context import fit
from nanochat.serve.engine_process import Piece
from nanochat.serve.metrics import Metrics
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.pool import Pool, QueueFullError
from nanochat.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    OldChatRequest,
    SamplingRequest,
    TokenizeRequest,
    conversation_of,
    error_body,
)
from nanochat.serve.worker import Answer, GenerationError
from nanochat.tokenizer import Tokenizer

DROPPED_HEADER = "X-Nanochat-Dropped-Messages"
"""how many of the oldest messages were left out so that the conversation fits the context"""
SECONDS_TO_LOAD = 5.0
MOST_LOGPROBS = 100_000
"""in one answer: the JSON of so many takes about 0.4 s of a processor"""
Result = TypeVar("Result")
Prompts = list[tuple[list[int], SamplingParams]]


def routes(pool: Pool, tokenizer: Tokenizer, defaults: SamplingParams, metrics: Metrics) -> APIRouter:
    """Everything under /v1, /tokenize and /chat/completions."""
    router = APIRouter()

    def chat_prompts(card: ModelCard, body: ChatRequest) -> tuple[Prompts, int]:
        samplings = body.samplings(defaults)
        prompt, dropped = fit(
            lambda messages: chat.prompt_tokens(tokenizer, card.source, messages),
            conversation_of(body.messages),
            card.context,
            samplings[0].max_tokens,
        )
        return [(prompt, own) for own in samplings], dropped

    def submitted(card: ModelCard, prompts: Prompts) -> "Submission":
        _check_logprobs([sampling for _, sampling in prompts], card.context)
        if pool.starting:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=SECONDS_TO_LOAD)
        try:
            return Submission(pool, metrics, pool.submit(card, prompts), prompts)
        except QueueFullError as error:
            message = "too many requests are waiting: try again in a moment"
            raise ApiError(429, message, code="queue_full", retry_after=error.retry_after) from None

    def asked_for(name: str | None) -> ModelCard:
        card = pool.menu.find(name)
        if card is None:
            message = f"there is no model {name!r}: GET /v1/models lists those there are"
            raise ApiError(404, message, code="model_not_found", param="model")
        return card

    @router.get("/v1/models")
    def models() -> Json:
        """The trained models, with the sampling they use where a request does not say."""
        return {"object": "list", "data": [_model(card, pool, defaults) for card in pool.menu.cards()]}

    @router.get("/v1/models/{name}")
    def model(name: str) -> Json:
        """One of them."""
        return _model(asked_for(name), pool, defaults)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream of server-sent events."""
        card = await asyncio.to_thread(asked_for, body.model)
        prompts, dropped = await asyncio.to_thread(chat_prompts, card, body)
        writer = ChatWriter(card.id, tokenizer, len(prompts), body.with_usage)
        headers = {DROPPED_HEADER: str(dropped)} if dropped else {}
        return await _respond(submitted(card, prompts), writer, body, request, headers, len(prompts[0][0]))

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text, or tokens."""
        card = await asyncio.to_thread(asked_for, body.model)
        texts = [_checked(prompt, tokenizer) for prompt in body.prompts()]
        encoded = [await asyncio.to_thread(_encoded, prompt, tokenizer, card.context) for prompt in texts]
        samplings = body.samplings(defaults)
        prompts = [(prompt, own) for prompt in encoded for own in samplings]
        shown = [tokenizer.decode(prompt[1:]) if body.echo else "" for prompt, _ in prompts]
        writer = TextWriter(card.id, tokenizer, len(prompts), body.with_usage, shown)
        read = sum(map(len, encoded))
        return await _respond(submitted(card, prompts), writer, body, request, {}, read)

    @router.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> Json:
        """The tokens of a text, or of a conversation as the model reads it."""
        card = asked_for(body.model)
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "give either text or messages")
        if body.messages is not None:
            tokens = chat.prompt_tokens(tokenizer, card.source, conversation_of(body.messages))
        else:
            tokens = tokenizer.encode(body.text or "")
        return {"count": len(tokens), "tokens": tokens, "max_model_len": card.context}

    @router.post("/chat/completions")
    async def old_chat_completions(body: OldChatRequest) -> Response:
        """The stream of the first nanochat: {"token", "gpu"} for each piece of text, at the end {"done"}."""
        card = pool.menu.default
        prompts, dropped = await asyncio.to_thread(chat_prompts, card, body.chat_request())
        submission = submitted(card, prompts)
        headers = {DROPPED_HEADER: str(dropped)} if dropped else {}
        return _Stream(_old_events(submission), submission.answer, headers)

    return router


def stats(pool: Pool) -> Json:
    """Each engine; the first nanochat's names for the counts are kept."""
    workers = [
        {
            "gpu_id": worker.gpu or 0,
            "model": worker.loaded.id if worker.loaded else None,
            "replies": len(worker.answers),
            "engine": asdict(worker.stats) if worker.stats else None,
        }
        for worker in pool.workers
    ]
    busy = sum(bool(worker.answers) for worker in pool.workers)
    return {
        "total_workers": len(workers),
        "busy_workers": busy,
        "available_workers": len(workers) - busy,
        "running": pool.running,
        "waiting": pool.waiting,
        "workers": workers,
    }


@dataclass
class Submission:
    """Replies on their way, and the clock that is kept on them."""

    pool: Pool
    metrics: Metrics
    answer: Answer
    prompts: Prompts
    began: float = field(default_factory=time.monotonic)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What arrives, noted in the metrics."""
        first: dict[int, tuple[float, int]] = {}
        async for index, piece in self.answer:
            now = time.monotonic()
            if index not in first:
                first[index] = (now, piece.tokens)
                self.metrics.first_token.observe(now - self.began)
            if piece.finish_reason:
                began, tokens = first[index]
                if now > began and piece.tokens > tokens:
                    self.metrics.speed.observe((piece.tokens - tokens) / (now - began))
                self.pool.finished(self.began)
            yield index, piece


async def _respond(
    submission: Submission,
    writer: Writer,
    body: SamplingRequest,
    request: Request,
    headers: dict[str, str],
    prompt_tokens: int,
) -> Response:
    """The answer as the client wants it."""
    answer = submission.answer
    if body.stream:
        return _Stream(_events(submission, writer, prompt_tokens), answer, headers)

    async def whole() -> Response:
        pieces: list[list[Piece]] = [[] for _ in submission.prompts]
        async for index, piece in submission.pieces():
            pieces[index].append(piece)
        usage = usage_of(prompt_tokens, sum(answer.tokens))
        # In a thread, since with logprobs it may be much, and the other streams go on meanwhile.
        return await asyncio.to_thread(lambda: JSONResponse(writer.whole(pieces, usage), headers=headers))

    try:
        return await _unless_gone(request, whole())
    finally:
        answer.cancel()


async def _events(submission: Submission, writer: Writer, prompt_tokens: int) -> AsyncIterator[str]:
    try:
        for chunk in writer.opening():
            yield event(chunk)
        async for index, piece in submission.pieces():
            yield "".join(event(chunk) for chunk in writer.chunks(index, piece))
        if writer.with_usage:
            yield event(writer.usage_chunk(usage_of(prompt_tokens, sum(submission.answer.tokens))))
    except GenerationError as error:
        yield event(error_body(500, str(error)))
    yield event("[DONE]")


async def _old_events(submission: Submission) -> AsyncIterator[str]:
    gpu = submission.answer.worker.gpu or 0
    with contextlib.suppress(GenerationError):  # that stream has no word for it: it just ends
        async for _, piece in submission.pieces():
            text = "".join(delta.text for delta in piece.deltas if delta.type == "text")
            if text:
                yield event({"token": text, "gpu": gpu})
    yield event({"done": True})


class _Stream(StreamingResponse):
    """Server-sent events; when they end, or the client leaves, the model turns to the next request."""

    def __init__(self, events: AsyncIterator[str], answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no", **headers})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


def _model(card: ModelCard, pool: Pool, defaults: SamplingParams) -> Json:
    about = {
        "source": card.source,
        "model_tag": card.model_tag,
        "step": card.step,
        "description": card.description,
        "context": card.context,
        "default": card == pool.menu.default,
        "loaded": any(worker.loaded == card for worker in pool.workers),
        "defaults": {
            name: getattr(defaults, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
        },
    }
    return {"id": card.id, "object": "model", "created": card.created, "owned_by": "nanochat", "nanochat": about}


def _checked(prompt: str | list[int], tokenizer: Tokenizer) -> str | list[int]:
    if not isinstance(prompt, str) and not all(0 <= token < tokenizer.vocab_size for token in prompt):
        raise ApiError(400, f"tokens are numbers from 0 to {tokenizer.vocab_size - 1}", param="prompt")
    return prompt


def _check_logprobs(samplings: list[SamplingParams], context: int) -> None:
    """Raises ApiError where more logprobs are asked for than one answer may hold."""
    asked = sum(min(s.max_tokens, context) * (1 + s.logprobs) for s in samplings if s.logprobs is not None)
    if asked > MOST_LOGPROBS:
        message = f"up to {asked} logprobs are asked for and {MOST_LOGPROBS} is the most: lower max_tokens, n or those"
        raise ApiError(400, message, param="logprobs")


def _encoded(prompt: str | list[int], tokenizer: Tokenizer, context: int) -> list[int]:
    """A prompt as tokens, <|bos|> first. Raises ApiError if it leaves no room in the context."""
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if tokens[:1] != [tokenizer.bos_id]:
        tokens = [tokenizer.bos_id, *tokens]
    if len(tokens) >= context:
        message = f"the prompt takes {len(tokens)} tokens and the model reads at most {context}: shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param="prompt")
    return tokens


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
