"""Anthropic's Messages API: https://platform.claude.com/docs/en/api/messages."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from nanochat.serve.engine_process import RequestOutput
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import ReplyGenerator
from nanochat.serve.protocol import MAX_MESSAGES, ChatRequest
from nanochat.serve.responses import Json, ResponseBuilder, text_of


class MessagesRequest(BaseModel, extra="allow"):
    """Body of POST /v1/messages. Fields such as `temperature` have the same meaning in ChatRequest."""

    messages: list[Json] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Any = None
    tool_choice: Json | None = None

    def to_chat(self) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        choice = (self.tool_choice or {}).get("type")
        fields = {
            **(self.model_extra or {}),
            "messages": [*system, *(own for message in self.messages for own in _chat_messages(message))],
            "tool_choice": "required" if choice in ("any", "tool") else choice,
        }
        return ChatRequest.model_validate(fields)


def routes(generator: ReplyGenerator) -> APIRouter:
    """Create the routes under /v1/messages."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Reply to a conversation in Anthropic's format."""
        chat = body.to_chat()
        generation = await generator.chat(chat)
        builder = MessageBuilder(generation, generator.tokenizer)
        return await generator.respond(generation, builder, request, stream=bool(chat.stream))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: MessagesRequest) -> Json:
        """Count the tokens of a conversation in Anthropic's format."""
        return {"input_tokens": (await generator.chat(body.to_chat())).num_prompt_tokens}

    return router


def _chat_messages(message: Json) -> list[Json]:
    """Convert a message to OpenAI's format, where tool calls are a field, and the result of each is a message."""
    blocks = message.get("content")
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        return [message]
    content, calls, results = [], [], []
    for block in blocks:
        match block.get("type"):
            case "tool_use":
                calls.append({"function": {"name": block.get("name"), "arguments": block.get("input")}})
            case "tool_result":
                results.append({"role": "tool", "content": block.get("content", "")})
            case "thinking" | "redacted_thinking":
                pass
            case _:
                content.append(block)
    if content or calls or not results:
        return [*results, {**message, "content": content, "tool_calls": calls or None}]
    return results


class MessageBuilder(ResponseBuilder):
    """Builds responses of /v1/messages."""

    id_prefix = "msg_"
    end = ""

    def event(self, chunk: Json) -> str:
        return f"event: {chunk['type']}\n{super().event(chunk)}"

    def opening_chunks(self) -> Iterable[Json]:
        yield {"type": "message_start", "message": self._message([], {"stop_reason": None, "stop_sequence": None}, 0)}
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

    def chunks(self, index: int, output: RequestOutput) -> Iterable[Json]:
        if text := text_of(output.deltas).text:
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        if output.finish_reason:
            yield {"type": "content_block_stop", "index": 0}
            yield {"type": "message_delta", "delta": _stop(output), "usage": {"output_tokens": output.num_tokens}}
            yield {"type": "message_stop"}

    def error_chunk(self, error: ApiError) -> Json:
        return {"type": "error", **error.body}

    def response(self, outputs: Sequence[list[RequestOutput]], num_tokens: int) -> Json:
        text = text_of(delta for output in outputs[0] for delta in output.deltas).text
        return self._message([{"type": "text", "text": text}], _stop(outputs[0][-1]), num_tokens)

    def _message(self, content: list[Json], stop: Json, num_tokens: int) -> Json:
        usage = {"input_tokens": self.generation.num_prompt_tokens, "output_tokens": num_tokens}
        shared = {"id": self._shared["id"], "model": self._shared["model"]}
        return {**shared, "type": "message", "role": "assistant", "content": content, **stop, "usage": usage}


def _stop(output: RequestOutput) -> Json:
    if output.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_string}
    return {"stop_reason": "max_tokens" if output.finish_reason == "length" else "end_turn", "stop_sequence": None}
