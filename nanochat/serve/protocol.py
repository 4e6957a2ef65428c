"""OpenAI's chat completions, as far as this server speaks them: requests, replies, stream chunks, errors.

https://platform.openai.com/docs/api-reference/chat. Two things are added, which other clients ignore:
`top_k` in a request, and a field `nanochat` that carries tool calls, which are not part of the text.
"""

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from nanochat.data import conversations
from nanochat.data.conversations import Part

Role = Literal["system", "user", "assistant"]
MAX_MESSAGES = 1000


def _whole_characters(text: str) -> str:
    """JSON can carry half a character (`"\\ud83d"`), which has no UTF-8 form: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, StringConstraints(strict=True), AfterValidator(_whole_characters)]


class ApiError(Exception):
    """A refusal, told to the client in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, code=code, param=param)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ContentPart(BaseModel):
    """A piece of a message. The types `python` and `python_output` may stand in what the assistant said."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]


class StreamOptions(BaseModel):
    """What a stream says besides the text."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. Fields unknown here are ignored."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0 or null: every token may be sampled")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # Ignoring these would give another answer than was asked for, so whoever sets them is told.
    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    stop: None = None
    logprobs: Literal[False] | None = None
    tools: None = None

    def conversation(self) -> list[conversations.Message]:
        """The messages as the model reads them. Raises ApiError where the turns do not alternate."""
        turns: list[conversations.Message] = []
        for i, message in enumerate(self.messages):
            role: Role = "system" if message.role == "developer" else message.role
            content: str | list[Part] = message.content if isinstance(message.content, str) else []
            if not isinstance(message.content, str):
                content = [Part(type=part.type, text=part.text) for part in message.content]
                if role != "assistant":
                    if any(part["type"] != "text" for part in content):
                        raise ApiError(400, "only the assistant's messages may hold tool calls", param=f"messages.{i}")
                    content = _said(content)
            turns.append({"role": role, "content": content})
        spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
        systems = [i for i, turn in enumerate(turns) if turn["role"] == "system"]
        alternating = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
        if systems not in ([], [0]) or spoken != alternating or len(spoken) % 2 == 0:
            raise ApiError(
                400,
                "messages must be an optional system message, then user and assistant in turn, the user's last",
                param="messages",
            )
        return turns


class ChatCompletion:
    """Builds every JSON object of one answer, so that they share its id and its time."""

    def __init__(self, model: str) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.model = model
        self.created = int(time.time())

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """One piece of a stream."""
        return self._object("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The piece that closes a stream whose client asked for usage."""
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def whole(self, parts: list[Part], finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": _said(parts), "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["nanochat"] = {"parts": parts}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _said(parts: list[Part]) -> str:
    """The text of a reply, without its tool calls."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def delta_of(kind: str, text: str) -> dict[str, Any]:
    """What a stream chunk says of one delta: text as content, tool calls in a field of our own."""
    return {"content": text} if kind == "text" else {"nanochat": {"type": kind, "text": text}}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
