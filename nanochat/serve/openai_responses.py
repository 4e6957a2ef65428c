"""OpenAI's Responses API: https://platform.openai.com/docs/api-reference/responses."""

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, StrictBool

from nanochat.inference.detokenizer import Delta
from nanochat.serve.engine_process import RequestOutput
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import ReplyGenerator
from nanochat.serve.protocol import ChatRequest, GenerationRequest, Text
from nanochat.serve.responses import Json, ResponseBuilder, merge_deltas, text_of
from nanochat.tokenizer import Tokenizer

MAX_STORED_CHARACTERS = 20_000_000


class StoredConversations:
    """Conversations by the id of the response that ends them. The oldest are dropped when they get too large."""

    def __init__(self) -> None:
        self._conversations: OrderedDict[str, list[Json]] = OrderedDict()
        self._num_characters = 0

    def add(self, response_id: str, messages: list[Json]) -> None:
        self._conversations[response_id] = messages
        self._num_characters += len(json.dumps(messages))
        while self._num_characters > MAX_STORED_CHARACTERS:
            self._num_characters -= len(json.dumps(self._conversations.popitem(last=False)[1]))

    def get(self, response_id: str, param: str) -> list[Json]:
        """Return a conversation. Raises ApiError if it is not stored."""
        if response_id not in self._conversations:
            message = f"{response_id!r} is unknown: only recent responses are stored; send the whole conversation"
            raise ApiError(400, message, code="previous_response_not_found", param=param)
        return self._conversations[response_id]


def _to_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesRequest(BaseModel, extra="allow"):
    """Body of POST /v1/responses. Fields such as `temperature` have the same meaning in ChatRequest."""

    input: Annotated[list[Json], BeforeValidator(_to_items, str | list[Json])]
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: StrictBool | None = None
    text: dict[str, Any] | None = None
    background: Literal[False] | None = None

    def messages(self, stored: StoredConversations) -> list[Json]:
        """Return the conversation without the instructions, as messages of a chat request."""
        id = self.previous_response_id
        earlier = stored.get(id, "previous_response_id") if id else []
        return [*earlier, *(message for item in self.input for message in _chat_messages(item, stored))]

    def to_chat(self, messages: list[Json]) -> ChatRequest:
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = {**(self.model_extra or {}), "messages": [*system, *messages]}
        if isinstance(format := (self.text or {}).get("format"), dict):
            fields["response_format"] = {"type": format.get("type"), "json_schema": format}
        return ChatRequest.model_validate(fields)


def routes(generator: ReplyGenerator) -> APIRouter:
    """Create the route /v1/responses."""
    router = APIRouter()
    stored = StoredConversations()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Reply to a conversation in the format of OpenAI's Responses API."""
        messages = body.messages(stored)
        chat = body.to_chat(messages)
        generation = await generator.chat(chat)
        builder = ResponsesBuilder(generation, generator.tokenizer, body, messages, stored)
        return await generator.respond(generation, builder, request, stream=bool(chat.stream))

    return router


def _chat_messages(item: Json, stored: StoredConversations) -> list[Json]:
    """Convert an input item to messages of a chat request."""
    match item.get("type"):
        case None | "message":
            return [item]
        case "function_call":
            return [{"role": "assistant", "tool_calls": [{"function": item}]}]
        case "function_call_output":
            return [{"role": "tool", "content": item.get("output")}]
        case "item_reference":  # to the message of an earlier response
            return stored.get(str(item.get("id")).replace("msg_", "resp_"), "input")[-1:]
        case "reasoning":
            return []
        case other:
            raise ApiError(400, f"input items of type {other!r} are not supported: send messages", param="input")


class ResponsesBuilder(ResponseBuilder):
    """Builds responses of /v1/responses and stores their conversations."""

    id_prefix = "resp_"
    end = ""

    def __init__(
        self,
        generation: GenerationRequest,
        tokenizer: Tokenizer,
        body: ResponsesRequest,
        messages: list[Json],
        stored: StoredConversations,
    ) -> None:
        super().__init__(generation, tokenizer)
        self.body = body
        self.messages = messages
        self.stored = stored
        self.id = str(self._shared["id"])
        self._place: Json = {"item_id": self.id.replace("resp_", "msg_"), "output_index": 0, "content_index": 0}
        self._numbers = itertools.count()
        self._deltas: list[Delta] = []

    def event(self, chunk: Json) -> str:
        return f"event: {chunk['type']}\n{super().event({**chunk, 'sequence_number': next(self._numbers)})}"

    def opening_chunks(self) -> Iterable[Json]:
        for event in ("response.created", "response.in_progress"):
            yield {"type": event, "response": self._response("in_progress")}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **self._place, "part": _part("")}

    def chunks(self, index: int, output: RequestOutput) -> Iterable[Json]:
        self._deltas += output.deltas
        if text := text_of(output.deltas).text:
            yield {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": []}
        if output.finish_reason:
            response = self._finish(output)
            (item,) = response["output"]
            (part,) = item["content"]
            yield {"type": "response.output_text.done", **self._place, "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **self._place, "part": part}
            yield {"type": "response.output_item.done", "output_index": 0, "item": item}
            yield {"type": f"response.{response['status']}", "response": response}

    def error_chunk(self, error: ApiError) -> Json:
        reason = {"code": "server_error", "message": str(error)}
        return {"type": "response.failed", "response": {**self._response("failed"), "error": reason}}

    def response(self, outputs: Sequence[list[RequestOutput]], num_tokens: int) -> Json:
        self._deltas = [delta for output in outputs[0] for delta in output.deltas]
        return self._finish(outputs[0][-1])

    def _finish(self, output: RequestOutput) -> Json:
        """Build the finished response and store its conversation."""
        if self.body.store is not False:
            parts = [{"type": delta.type, "text": delta.text} for delta in merge_deltas(self._deltas)]
            self.stored.add(self.id, [*self.messages, {"role": "assistant", "content": parts}])
        status = "incomplete" if output.finish_reason == "length" else "completed"
        num_prompt_tokens = self.generation.num_prompt_tokens
        return {
            **self._response(status),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(status, [_part(text_of(self._deltas).text)])],
            "usage": {
                "input_tokens": num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": output.num_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_prompt_tokens + output.num_tokens,
            },
        }

    def _response(self, status: str) -> Json:
        unset: Json = {"error": None, "tools": [], "tool_choice": "auto", "metadata": {}, "parallel_tool_calls": True}
        given = self.body.model_dump(exclude={"input", "stream"}, exclude_none=True)
        own = {"id": self.id, "object": "response", "created_at": self._shared["created"], "status": status}
        return {**unset, **given, **own, "model": self._shared["model"], "output": []}

    def _item(self, status: str, content: list[Json]) -> Json:
        own_id = self._place["item_id"]
        return {"id": own_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
