"""Generate replies for all APIs: prepare a parsed request, then respond with one JSON object or a stream of events.

To add an API, convert its body to a ChatRequest or CompletionRequest and format the replies with a ResponseBuilder:

    generation = await generator.chat(ChatRequest(messages=..., temperature=...))
    builder = MyResponseBuilder(generation, tokenizer)
    return await generator.respond(generation, builder, request, stream=True)
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.inference import chat
from nanochat.inference.json_constraint import check_schema
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.engine_process import Prompts, RequestOutput
from nanochat.serve.errors import ApiError
from nanochat.serve.metrics import Metrics
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.pool import EnginePool, ReplyStream
from nanochat.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    SamplingRequest,
    join_text,
    truncate_conversation,
)
from nanochat.serve.responses import ResponseBuilder
from nanochat.tokenizer import Tokenizer

DROPPED_HEADER = "X-Nanochat-Dropped-Messages"  # number of oldest messages that did not fit in the context
MAX_RESPONSE_LOGPROBS = 100_000  # converting this many to JSON takes 0.4 s of CPU time


class ReplyGenerator:
    """Prepares requests, submits them to the engines and sends the responses."""

    def __init__(self, pool: EnginePool, tokenizer: Tokenizer, defaults: SamplingParams, metrics: Metrics) -> None:
        """defaults: sampling parameters for fields that a request does not set; the seed is always random."""
        self.pool = pool
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.metrics = metrics

    async def find_model(self, name: str | None) -> ModelCard:
        """Return the model with this name, or the default. Raises ApiError if it does not exist."""
        card = await asyncio.to_thread(self.pool.registry.find, name)
        if card is None:
            message = f"model {name!r} does not exist: GET /v1/models lists all models"
            raise ApiError(404, message, code="model_not_found", param="model")
        return card

    async def chat(self, body: ChatRequest) -> GenerationRequest:
        """Prepare the reply to a conversation. Raises ApiError if it does not fit in the context."""
        card = await self.find_model(body.model)
        samplings = await self._samplings(body)
        prompt, dropped = await asyncio.to_thread(
            truncate_conversation,
            lambda messages: chat.prompt_tokens(self.tokenizer, card.source, messages),
            body.conversation(),
            card.context,
            samplings[0].max_tokens,
        )
        if len(prompt) >= card.context:
            raise self._conversation_too_long(card, body.messages, len(prompt))
        return GenerationRequest(card, [(prompt, own) for own in samplings], len(prompt), dropped)

    async def completion(self, body: CompletionRequest) -> GenerationRequest:
        """Prepare the continuation of texts or tokens. Raises ApiError if one does not fit in the context."""
        card = await self.find_model(body.model)
        samplings = await self._samplings(body)
        prompts, length = [], 0
        for i, prompt in enumerate(body.prompt):
            tokens = await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            self.check_tokens(tokens, f"prompt[{i}]")
            added = [] if tokens[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id]
            tokens = added + tokens
            if len(tokens) + min(samplings[0].max_tokens, 1) > card.context:
                raise _too_long(card.context, f"prompt[{i}] has {len(tokens)}: shorten it", f"prompt[{i}]")
            prompts += [(tokens, replace(own, echo_from=len(added) if body.echo else None)) for own in samplings]
            length += len(tokens)
        return GenerationRequest(card, prompts, length)

    async def _samplings(self, body: SamplingRequest) -> list[SamplingParams]:
        """Return the sampling parameters. Raises ApiError if token ids or the JSON schema are invalid."""
        samplings = body.sampling_params(self.defaults)
        self.check_tokens([token for token, _ in samplings[0].logit_bias], "logit_bias")
        self.check_tokens(samplings[0].stop_token_ids, "stop_token_ids")
        if schema := body.json_schema_text:
            await asyncio.to_thread(check_schema, schema)
        return samplings

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raise ApiError if a token id is not in the vocabulary."""
        if not all(0 <= token < self.tokenizer.vocab_size for token in tokens):
            message = f"{param} must have token ids from 0 to {self.tokenizer.vocab_size - 1}"
            raise ApiError(400, message, param=param)

    def _conversation_too_long(self, card: ModelCard, messages: list[Message], length: int) -> ApiError:
        """Build the error for a conversation whose system message and last turn alone do not fit."""
        roles = [message.turn_role for message in messages]
        last_user = max((i for i, role in enumerate(roles) if role != "assistant"), default=0)
        first_kept = max((i + 1 for i in range(last_user) if roles[i] == "assistant"), default=0)
        kept = [i for i, role in enumerate(roles) if i >= first_kept or set(roles[: i + 1]) == {"system"}]
        sizes = {i: len(self.tokenizer.encode(join_text(messages[i].parts()))) for i in kept}
        longest = max(kept, key=sizes.__getitem__)
        name = f"messages[{longest}]"
        details = f"the shortest possible prompt has {length}: shorten {name} ({messages[longest].role})"
        return _too_long(card.context, f"{details}, which has {sizes[longest]}", name)

    async def _outputs(self, replies: ReplyStream) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield reply index and output as they arrive, and record latency and speed of each reply."""
        start = time.monotonic()
        first: dict[int, tuple[float, int]] = {}
        async for index, output in replies:
            now = time.monotonic()
            if index not in first:
                first[index] = (now, output.num_tokens)
                self.metrics.first_token.observe(now - start)
            first_time, first_tokens = first[index]
            if output.finish_reason and now > first_time and output.num_tokens > first_tokens:
                self.metrics.speed.observe((output.num_tokens - first_tokens) / (now - first_time))
            yield index, output

    async def respond(
        self, generation: GenerationRequest, builder: ResponseBuilder, request: Request, *, stream: bool
    ) -> Response:
        """Generate the replies and return them in one response or as a stream."""
        headers = {DROPPED_HEADER: str(generation.dropped_messages)} if generation.dropped_messages else {}
        if len(generation.prompts) > 1 and not builder.can_repeat:
            raise ApiError(400, "n must be 1 in this API", param="n")
        _check_logprobs(generation.prompts, generation.card.context)
        replies = self.pool.submit(generation.card, generation.prompts)
        outputs = self._outputs(replies)
        if stream:
            return _EventStream(_events(outputs, builder, replies), builder.media_type, replies, headers)

        async def collect() -> Response:
            collected: list[list[RequestOutput]] = [[] for _ in generation.prompts]
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


async def _events(
    outputs: AsyncIterator[tuple[int, RequestOutput]], builder: ResponseBuilder, replies: ReplyStream
) -> AsyncIterator[str]:
    try:
        for chunk in builder.opening_chunks():
            yield builder.event(chunk)
        async for index, output in outputs:
            yield "".join(builder.event(chunk) for chunk in builder.chunks(index, output))
        for chunk in builder.closing_chunks(sum(replies.tokens)):
            yield builder.event(chunk)
    except ApiError as error:
        yield builder.event(builder.error_chunk(error))
    yield builder.end


class _EventStream(StreamingResponse):
    """A stream of events. Unfinished replies are cancelled when the client disconnects."""

    def __init__(
        self, events: AsyncIterator[str], media_type: str, replies: ReplyStream, headers: dict[str, str]
    ) -> None:
        # X-Accel-Buffering: nginx would otherwise buffer the stream.
        super().__init__(events, media_type=media_type, headers={"X-Accel-Buffering": "no", **headers})
        self.replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.replies.cancel()


def _too_long(context: int, details: str, param: str) -> ApiError:
    # In OpenAI's words, which clients search for.
    message = f"This model's maximum context length is {context} tokens, but {details}"
    return ApiError(400, message, code="context_length_exceeded", param=param)


def _check_logprobs(prompts: Prompts, context: int) -> None:
    count = 0
    for prompt, sampling in prompts:
        if sampling.logprobs is not None:
            tokens = min(sampling.max_tokens, context - len(prompt)) + sampling.needs_prompt_logprobs * len(prompt)
            count += tokens * (1 + sampling.logprobs)
    if count > MAX_RESPONSE_LOGPROBS:
        message = f"logprobs per response must be at most {MAX_RESPONSE_LOGPROBS}, got {count}: lower max_tokens or n"
        raise ApiError(400, message, param="logprobs")


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
