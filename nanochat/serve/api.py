"""The OpenAI-compatible API: https://platform.openai.com/docs/api-reference/chat."""

import asyncio
from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanochat.inference import chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import ReplyGenerator
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.pool import EnginePool
from nanochat.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    to_conversation,
)
from nanochat.serve.responses import ChatResponseBuilder, Json, TextResponseBuilder


def routes(generator: ReplyGenerator) -> APIRouter:
    """Create the routes under /v1, /tokenize and /detokenize."""
    router = APIRouter()
    pool, tokenizer, defaults = generator.pool, generator.tokenizer, generator.defaults

    @router.get("/v1/models")
    def models() -> Json:
        """List the trained models and their default sampling parameters."""
        return {"object": "list", "data": [_model_object(card, pool, defaults) for card in pool.registry.cards()]}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> Json:
        """Describe one model."""
        return _model_object(await generator.find_model(name), pool, defaults)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation, in one response or as a stream of server-sent events."""
        generation = await generator.chat(body)
        builder = ChatResponseBuilder(generation, tokenizer, body.include_usage)
        return await generator.respond(generation, builder, request, stream=bool(body.stream))

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text or tokens, without the chat format."""
        generation = await generator.completion(body)
        builder = TextResponseBuilder(generation, tokenizer, body.include_usage)
        return await generator.respond(generation, builder, request, stream=bool(body.stream))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Json:
        """Tokenize a text, or a conversation in the chat format."""
        card = await generator.find_model(body.model)
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "exactly one of text and messages is required")
        if body.messages is not None:
            messages = to_conversation(body.messages)
            tokens = await asyncio.to_thread(chat.prompt_tokens, tokenizer, card.source, messages)
        else:
            tokens = await asyncio.to_thread(tokenizer.encode, body.text or "")
        return {"count": len(tokens), "tokens": tokens, "max_model_len": card.context}

    @router.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> Json:
        """Convert tokens to text, which vLLM calls `prompt` and llama.cpp `content`."""
        generator.check_tokens(body.tokens, "tokens")
        text = tokenizer.decode(body.tokens)
        return {"prompt": text, "content": text}

    @router.post("/v1/embeddings", include_in_schema=False)
    @router.post("/api/embed", include_in_schema=False)
    @router.post("/api/embeddings", include_in_schema=False)
    def embeddings() -> None:
        raise ApiError(404, "the models of this server only generate text: for embeddings, use another server")

    return router


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
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "nanochat",
        "max_model_len": card.context,
        "nanochat": details,
    }
