"""Ollama's API, for programs that only have a setting for Ollama: https://docs.ollama.com/api."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, StrictBool

from nanochat.serve.engine_process import RequestOutput
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import ReplyGenerator
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, Text
from nanochat.serve.responses import Json, ResponseBuilder, text_of
from nanochat.tokenizer import Tokenizer

VERSION = "0.12.6"  # some clients refuse older versions of Ollama


class OllamaRequest(BaseModel, extra="allow"):
    """Body of POST /api/chat, /api/generate and /api/show. ChatRequest defines the other fields and the options."""

    model: Text | None = None
    stream: StrictBool = True
    format: Any = None  # "json", or a JSON schema
    options: Json = {}
    messages: list[Json] = []
    prompt: Text = ""
    system: Text = ""
    images: list[Any] = []
    raw: StrictBool = False  # continue the prompt, without the chat format

    def fields(self) -> Json:
        """Return the fields that ChatRequest and CompletionRequest share."""
        fields = {**(self.model_extra or {}), **self.options, "model": self.model}
        if isinstance(self.format, dict):
            schema = {"name": "format", "schema": self.format}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.format:
            fields["response_format"] = {"type": f"{self.format}_object"}
        return fields

    def chat_messages(self) -> list[Json]:
        """Return the messages for ChatRequest, or none if the model only has to be loaded."""
        messages = self.messages
        if self.prompt:
            system = [{"role": "system", "content": self.system}] if self.system else []
            messages = [*system, {"role": "user", "content": self.prompt, "images": self.images}]
        # Images become parts of the content, which ChatRequest rejects.
        return [{**own, "content": [{"type": "image"}]} if own.get("images") else own for own in messages]


def routes(generator: ReplyGenerator) -> APIRouter:
    """Create the routes under /api."""
    router = APIRouter()

    @router.post("/api/chat")
    @router.post("/api/generate")
    async def reply(body: OllamaRequest, request: Request) -> Response:
        """Reply to a conversation or a prompt in Ollama's format."""
        if body.raw:
            completion = CompletionRequest.model_validate({**body.fields(), "prompt": body.prompt})
            generation = await generator.completion(completion)
        elif messages := body.chat_messages():
            generation = await generator.chat(ChatRequest.model_validate({**body.fields(), "messages": messages}))
        else:
            card = await generator.find_model(body.model)
            empty = {"message": {"role": "assistant", "content": ""}, "response": ""}
            return JSONResponse({"model": card.id, "created_at": _now(), **empty, "done": True, "done_reason": "load"})
        builder = OllamaResponseBuilder(generation, generator.tokenizer, as_message=request.url.path == "/api/chat")
        return await generator.respond(generation, builder, request, stream=body.stream)

    @router.get("/api/tags")
    def api_tags() -> Json:
        """List the models in Ollama's format."""
        return {"models": [_model(card) for card in generator.pool.registry.cards()]}

    @router.get("/api/ps")
    def api_ps() -> Json:
        """List the loaded models in Ollama's format."""
        return {"models": [_model(card) for card in {engine.loaded for engine in generator.pool.engines} if card]}

    @router.post("/api/show")
    async def api_show(body: OllamaRequest) -> Json:
        """Describe a model in Ollama's format."""
        card = await generator.find_model(body.model)
        info = {"general.architecture": "nanochat", "general.parameter_count": card.num_parameters}
        info["nanochat.context_length"] = card.context
        return {"details": _model(card)["details"], "model_info": info, "capabilities": ["completion"]}

    @router.get("/api/version")
    def api_version() -> Json:
        """Return the version of Ollama that this API follows."""
        return {"version": VERSION}

    return router


class OllamaResponseBuilder(ResponseBuilder):
    """Builds responses of /api/chat and /api/generate."""

    id_prefix = ""
    media_type = "application/x-ndjson"
    end = ""

    def __init__(self, generation: GenerationRequest, tokenizer: Tokenizer, as_message: bool) -> None:
        super().__init__(generation, tokenizer)
        self.as_message = as_message
        self.start = time.monotonic_ns()

    def event(self, chunk: Json) -> str:
        return json.dumps(chunk, ensure_ascii=False) + "\n"

    def chunks(self, index: int, output: RequestOutput) -> Iterable[Json]:
        if text := text_of(output.deltas).text:
            yield self._chunk(text, {"done": False})
        if output.finish_reason:
            yield self._chunk("", self._statistics(output))

    def error_chunk(self, error: ApiError) -> Json:
        return {"error": str(error)}

    def response(self, outputs: Sequence[list[RequestOutput]], num_tokens: int) -> Json:
        text = text_of(delta for output in outputs[0] for delta in output.deltas).text
        return self._chunk(text, self._statistics(outputs[0][-1]))

    def _chunk(self, text: str, rest: Json) -> Json:
        content = {"message": {"role": "assistant", "content": text}} if self.as_message else {"response": text}
        return {"model": self.generation.card.id, "created_at": _now(), **content, **rest}

    def _statistics(self, output: RequestOutput) -> Json:
        duration = time.monotonic_ns() - self.start  # the time to the first token is not measured separately
        counts = {"prompt_eval_count": self.generation.num_prompt_tokens, "eval_count": output.num_tokens}
        durations = {"total_duration": duration, "eval_duration": duration}
        return {"done": True, "done_reason": output.finish_reason, **counts, **durations}


def _model(card: ModelCard) -> Json:
    name = f"{card.id}:latest"
    details = {"format": "safetensors", "family": "nanochat", "families": ["nanochat"], "quantization_level": "F32"}
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(card.created, UTC).isoformat(),
        "size": 4 * card.num_parameters,
        "digest": hashlib.sha256(f"{name} {card.step} {card.created}".encode()).hexdigest(),
        "details": {**details, "parameter_size": f"{card.num_parameters / 1e6:.1f}M"},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat()
