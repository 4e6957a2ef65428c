"""Ollama's API, for programs that only have a setting for Ollama: https://docs.ollama.com/api."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, StrictBool

from nanochat.serve.engine_process import RequestOutput
from nanochat.serve.generation import ReplyGenerator
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, Text, translate
from nanochat.serve.responses import Json, ResponseBuilder, text_of
from nanochat.tokenizer import Tokenizer

VERSION = "0.12.6"  # some clients refuse older versions of Ollama
RENAMED_OPTIONS = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
NAMES = {"response_format": "format", **{name: f"options.{own}" for own, name in RENAMED_OPTIONS.items()}}


class OllamaRequest(BaseModel, extra="allow"):
    """Body of POST /api/chat. Other fields and most options have the same meaning in ChatRequest."""

    model: Text | None = None
    stream: StrictBool = True
    format: Text | Json | None = None  # "json", or a JSON schema
    options: Json | None = None
    messages: list[Json] = []

    def fields(self) -> Json:
        """Return the fields of ChatRequest, without the messages."""
        fields = {RENAMED_OPTIONS.get(name, name): value for name, value in (self.options or {}).items()}
        if isinstance(self.format, dict):
            schema = {"name": "format", "schema": self.format}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.format:
            fields["response_format"] = {"type": f"{self.format}_object"}
        return {**fields, **(self.model_extra or {}), "model": _model_name(self.model)}


class OllamaGenerateRequest(OllamaRequest):
    """Body of POST /api/generate."""

    prompt: Text = ""
    system: Text | None = None
    images: list[Any] | None = None
    raw: StrictBool | None = None  # continue the prompt, without the chat format


class ShowRequest(BaseModel):
    """Body of POST /api/show."""

    model: Text | None = None


def routes(generator: ReplyGenerator) -> APIRouter:
    """Create the routes under /api."""
    router = APIRouter()

    async def respond(
        generation: GenerationRequest, body: OllamaRequest, wrap: Callable[[str], Json], request: Request
    ) -> Response:
        builder = OllamaResponseBuilder(generation, generator.tokenizer, wrap)
        return await generator.respond(generation, builder, request, stream=body.stream)

    async def chat(
        body: OllamaRequest, messages: list[Json], wrap: Callable[[str], Json], request: Request
    ) -> Response:
        if not messages:  # a request to load the model
            card = await generator.find_model(_model_name(body.model))
            loaded = {"model": card.id, "created_at": _now(), **wrap(""), "done": True, "done_reason": "load"}
            return JSONResponse(loaded)
        fields = {**body.fields(), "messages": [_chat_message(message) for message in messages]}
        return await respond(await generator.chat(translate(ChatRequest, fields, NAMES)), body, wrap, request)

    @router.post("/api/chat")
    async def api_chat(body: OllamaRequest, request: Request) -> Response:
        """Reply to a conversation in Ollama's format."""
        return await chat(body, body.messages, _as_message, request)

    @router.post("/api/generate")
    async def api_generate(body: OllamaGenerateRequest, request: Request) -> Response:
        """Reply to a prompt in Ollama's format."""
        if body.raw:
            completion = translate(CompletionRequest, {**body.fields(), "prompt": body.prompt}, NAMES)
            return await respond(await generator.completion(completion), body, _as_response, request)
        system = [{"role": "system", "content": body.system}] if body.system else []
        user = {"role": "user", "content": body.prompt, "images": body.images}
        return await chat(body, [*system, user] if body.prompt else [], _as_response, request)

    @router.get("/api/tags")
    def api_tags() -> Json:
        """List the models in Ollama's format."""
        return {"models": [_model(card) for card in generator.pool.registry.cards()]}

    @router.get("/api/ps")
    def api_ps() -> Json:
        """List the loaded models in Ollama's format."""
        return {"models": [_model(card) for card in {engine.loaded for engine in generator.pool.engines} if card]}

    @router.post("/api/show")
    async def api_show(body: ShowRequest) -> Json:
        """Describe a model in Ollama's format."""
        card = await generator.find_model(_model_name(body.model))
        info = {
            "general.architecture": "nanochat",
            "general.parameter_count": card.num_parameters,
            "nanochat.context_length": card.context,
        }
        return {"details": _model(card)["details"], "model_info": info, "capabilities": ["completion"]}

    @router.get("/api/version")
    def api_version() -> Json:
        """Return the version of Ollama that this API follows."""
        return {"version": VERSION}

    return router


class OllamaResponseBuilder(ResponseBuilder):
    """Builds responses of /api/chat and /api/generate."""

    id_prefix = "ollama"
    media_type = "application/x-ndjson"
    end = ""

    def __init__(self, generation: GenerationRequest, tokenizer: Tokenizer, wrap: Callable[[str], Json]) -> None:
        """wrap: build the part of a response that contains the text."""
        super().__init__(generation, tokenizer)
        self.wrap = wrap
        self.start = time.monotonic_ns()

    def event(self, chunk: Json) -> str:
        return json.dumps(chunk, ensure_ascii=False) + "\n"

    def chunks(self, index: int, output: RequestOutput) -> Iterable[Json]:
        if text := text_of(output.deltas).text:
            yield self._chunk(text)
        if output.finish_reason:
            yield self._final_chunk("", output)

    def error_chunk(self, error: ApiError) -> Json:
        return {"error": str(error)}

    def response(self, outputs: Sequence[list[RequestOutput]], num_tokens: int) -> Json:
        text = text_of(delta for output in outputs[0] for delta in output.deltas).text
        return self._final_chunk(text, outputs[0][-1])

    def _chunk(self, text: str) -> Json:
        return {"model": self.generation.card.id, "created_at": _now(), **self.wrap(text), "done": False}

    def _final_chunk(self, text: str, output: RequestOutput) -> Json:
        duration = time.monotonic_ns() - self.start
        return {
            **self._chunk(text),
            "done": True,
            "done_reason": output.finish_reason,
            "total_duration": duration,
            "prompt_eval_count": self.generation.num_prompt_tokens,
            "eval_count": output.num_tokens,
            "eval_duration": duration,  # the time to the first token is not measured separately
        }


def _as_message(text: str) -> Json:
    return {"message": {"role": "assistant", "content": text}}


def _as_response(text: str) -> Json:
    return {"response": text}


def _model_name(name: str | None) -> str:
    return (name or "").removesuffix(":latest")


def _chat_message(message: Json) -> Json:
    """Convert images, which are a list next to the content, to parts of the content, for ChatRequest to reject."""
    images = [{"type": "image"} for _ in message.get("images") or ()]
    return {**message, "content": images} if images else message


def _model(card: ModelCard) -> Json:
    name = f"{card.id}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(card.created, UTC).isoformat(),
        "size": 4 * card.num_parameters,
        "digest": hashlib.sha256(f"{name} {card.step} {card.created}".encode()).hexdigest(),
        "details": {
            "format": "safetensors",
            "family": "nanochat",
            "families": ["nanochat"],
            "parameter_size": f"{card.num_parameters / 1e6:.1f}M",
            "quantization_level": "F32",
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat()
