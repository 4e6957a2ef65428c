"""What clients may send, in OpenAI's shape: https://platform.openai.com/docs/api-reference.

Added to it are `top_k`, `min_p` and `repetition_penalty`, and messages of the assistant may hold tool calls as parts.
Fields unknown here are ignored. Those that are known and would change the answer in a way that this server cannot are
refused, so that nobody takes another answer for the one asked for.
"""

import dataclasses
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, Strict, StrictBool, StringConstraints, field_validator

from nanochat import conversations
from nanochat.conversations import Part
from nanochat.inference.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams

MAX_MESSAGES = 1000
MAX_PROMPTS = 16
MAX_REPLIES = 16
MAX_RENDERED = 400_000
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def _whole_characters(text: str) -> str:
    """JSON can carry half a character (`"\\ud83d"`), which has no UTF-8 form: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, StringConstraints(strict=True), AfterValidator(_whole_characters)]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]


class ApiError(Exception):
    """A refusal, told to the client in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, code=code, param=param)
        self.headers = {"Retry-After": str(round(retry_after))} if retry_after else None


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ContentPart(BaseModel):
    """A piece of a message. The types `python` and `python_output` may stand in what the assistant said."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]


class ResponseFormat(BaseModel):
    """The form of a reply: text is the only one."""

    type: Literal["text"]


class StreamOptions(BaseModel):
    """What a stream says besides the text."""

    include_usage: StrictBool | None = None


class SamplingRequest(BaseModel):
    """What every request for a reply may say of it."""

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=0, le=1_000_000, description="0 or null: every token may be sampled")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.1, le=10)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    n: Whole | None = Field(None, ge=1, le=MAX_REPLIES)
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=0)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def samplings(self, defaults: SamplingParams) -> list[SamplingParams]:
        """One for each of the `n` replies, with our defaults where the request does not say."""
        asked: dict[str, Any] = {
            name: value
            for name in ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if "top_k" in self.model_fields_set:
            asked["top_k"] = self.top_k or None
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        first = dataclasses.replace(defaults, **asked, stop=stop, seed=seed)
        return [first.child(i) for i in range(self.n or 1)]


class ChatRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    logprobs: StrictBool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None

    def samplings(self, defaults: SamplingParams) -> list[SamplingParams]:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        asked = super().samplings(dataclasses.replace(defaults, logprobs=logprobs))
        longest = self.max_completion_tokens  # OpenAI's newer name
        return [dataclasses.replace(own, max_tokens=longest) for own in asked] if longest else asked


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions: text, or tokens, to be continued."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Whole], Field(min_length=1)]
        | Annotated[list[Annotated[list[Whole], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: StrictBool | None = None
    logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def samplings(self, defaults: SamplingParams) -> list[SamplingParams]:
        return super().samplings(dataclasses.replace(defaults, logprobs=self.logprobs))

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text, or a conversation as the model would read it."""

    model: str | None = None
    text: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)


class OldMessage(BaseModel):
    """A message as the first nanochat's page sent it."""

    role: Literal["system", "user", "assistant"]
    content: Text


class OldChatRequest(BaseModel):
    """The body of POST /chat/completions, the stream of the first nanochat."""

    messages: list[OldMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: Number | None = Field(None, ge=0, le=2)
    max_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    top_k: Whole | None = Field(None, ge=0, le=1_000_000)

    def chat_request(self) -> ChatRequest:
        """The same in OpenAI's words."""
        return ChatRequest.model_validate({**self.model_dump(exclude_none=True), "stream": True})


class RenderRequest(BaseModel):
    """The body of POST /render: Markdown that the page wants to show."""

    texts: list[Annotated[Text, StringConstraints(max_length=200_000)]] = Field(max_length=MAX_MESSAGES)

    @field_validator("texts")
    @classmethod
    def _together(cls, texts: list[str]) -> list[str]:
        if sum(map(len, texts)) > MAX_RENDERED:
            raise ValueError(f"all texts together may have {MAX_RENDERED} characters")
        return texts


def conversation_of(messages: list[Message]) -> list[conversations.Message]:
    """The messages as the model reads them; neighbours of one role become one message.

    Raises ApiError where they are not, but for that, a system message, then user and assistant in turn.
    """
    turns: list[conversations.Message] = []
    for i, message in enumerate(messages):
        role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
        parts = _parts(message, f"messages.{i}.content")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _joined(turns[-1]["content"], parts, role)
        else:
            turns.append({"role": role, "content": parts if role == "assistant" else said(parts)})
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    systems = [i for i, turn in enumerate(turns) if turn["role"] == "system"]
    if systems not in ([], [0]) or spoken[:1] != ["user"] or spoken[-1:] != ["user"]:
        raise ApiError(
            400,
            "messages must be an optional system message, then user and assistant in turn, the user's last",
            param="messages",
        )
    return turns


def said(parts: list[Part]) -> str:
    """The text of a message, without its tool calls."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def _parts(message: Message, place: str) -> list[Part]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    parts: list[Part] = [{"type": part.type, "text": part.text} for part in message.content]
    if message.role != "assistant" and any(part["type"] != "text" for part in parts):
        raise ApiError(400, "only the assistant's messages may hold tool calls", param=place)
    return parts


def _joined(before: str | list[Part], after: list[Part], role: str) -> str | list[Part]:
    if role == "assistant":
        assert isinstance(before, list)
        return before + after
    return f"{before}\n\n{said(after)}"
