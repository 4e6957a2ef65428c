"""Request bodies of the OpenAI API (https://platform.openai.com/docs/api-reference) and their validation.

Extensions are `top_k`, `min_p`, `repetition_penalty`, and assistant messages with tool calls as parts. Unknown fields
are ignored. Known fields that this server does not support are rejected if they would change the reply.
"""

import bisect
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    Field,
    Strict,
    StrictBool,
    StringConstraints,
    ValidationError,
    model_validator,
)

from nanochat import conversations
from nanochat.conversations import Part
from nanochat.inference.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from nanochat.serve.model_registry import ModelCard

MAX_MESSAGES = 1000
MAX_PROMPTS = 16
MAX_REPLIES = 16
MAX_REPLY_FRACTION = 4  # at most a quarter of the context is reserved for the reply
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
Request = TypeVar("Request", bound=BaseModel)


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON allows (`"\\ud83d"`) but UTF-8 does not, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, StringConstraints(strict=True), AfterValidator(_replace_surrogates)]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        error_type = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}
        self.status = status
        self.code = code
        self.headers = headers

    def response_to(self, path: str) -> JSONResponse:
        """Build the response to a request of `path`, in the format of its API."""
        if path.startswith("/api/"):  # Ollama
            return JSONResponse({"error": str(self)}, self.status, self.headers)
        anthropic = {"type": "error"} if path.startswith("/v1/messages") else {}
        return JSONResponse({**anthropic, **self.body}, self.status, self.headers)


@dataclass(frozen=True)
class GenerationRequest:
    """The replies that an API request asks for, whatever its format."""

    card: ModelCard
    prompts: list[tuple[list[int], SamplingParams]]  # one per reply
    num_prompt_tokens: int  # each prompt counts once, even if it gets several replies
    dropped_messages: int = 0  # oldest messages that did not fit in the context


class ContentPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]

    @property
    def turn_role(self) -> Literal["system", "user", "assistant"]:
        return "system" if self.role == "developer" else self.role

    def parts(self) -> list[Part]:
        if isinstance(self.content, str):
            return [{"type": "text", "text": self.content}]
        return [{"type": part.type, "text": part.text} for part in self.content]

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        if self.role != "assistant" and any(part["type"] != "text" for part in self.parts()):
            raise ValueError("only assistant messages can have tool calls")
        return self


class ResponseFormat(BaseModel):
    type: Literal["text"]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = None


class SamplingRequest(BaseModel):
    """Fields shared by both completion endpoints."""

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = Field(None, ge=1, le=1_000_000)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=0, le=1_000_000, description="0 or null: all tokens")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.1, le=10)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_REPLIES)
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=0)

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, defaults: SamplingParams) -> list[SamplingParams]:
        """Return the parameters of each of the `n` replies. Fields that are not set take the server's defaults."""
        given: dict[str, Any] = {
            name: value
            for name in ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if "top_k" in self.model_fields_set:
            given["top_k"] = self.top_k or None
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        params = dataclasses.replace(defaults, **given, stop=stop, seed=seed, logprobs=self.num_logprobs)
        return [params.child(i) for i in range(self.n or 1)]


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Integer | None = Field(None, ge=1, le=1_000_000)
    logprobs: StrictBool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _rename_max_tokens(self) -> Self:
        self.max_tokens = self.max_completion_tokens or self.max_tokens  # the former is OpenAI's newer name
        return self


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions: one or more prompts as text or token ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Integer], Field(min_length=1)]
        | Annotated[list[Annotated[list[Integer], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: StrictBool | None = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a text, which vLLM calls `prompt` and llama.cpp `content`, or a conversation."""

    model: str | None = None
    text: Text | None = Field(None, validation_alias=AliasChoices("text", "prompt", "content"))
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    tokens: list[Integer]


class RenderRequest(BaseModel):
    """Body of POST /render: Markdown texts to convert to HTML."""

    texts: list[Text] = Field(max_length=MAX_MESSAGES)


def translate(request_type: type[Request], fields: dict[str, Any], names: Mapping[str, str]) -> Request:
    """Build an OpenAI request from fields of another API. Raises RequestValidationError with that API's names.

    names: of fields in that API, where they differ.
    """
    try:
        return request_type.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            name, *rest = detail["loc"]
            detail["loc"] = ("body", names.get(str(name), name), *rest)
        raise RequestValidationError(details) from None


def to_conversation(messages: list[Message]) -> list[conversations.Message]:
    """Convert a request's messages; consecutive messages of one role are merged.

    Raises ApiError unless they are an optional system message, then user and assistant alternating, ending with user.
    """
    turns: list[conversations.Message] = []
    for role, group in itertools.groupby(messages, lambda message: message.turn_role):
        contents = [message.parts() for message in group]
        if role == "assistant":
            turns.append({"role": role, "content": list(itertools.chain(*contents))})
        else:
            turns.append({"role": role, "content": "\n\n".join(map(join_text, contents))})
    roles = [turn["role"] for turn in turns]
    dialog = roles[1:] if roles[0] == "system" else roles
    if "system" in dialog or dialog[:1] != ["user"] or dialog[-1:] != ["user"]:
        expected = "messages must be an optional system message, then user and assistant alternating, ending with user"
        raise ApiError(400, expected, param="messages")
    return turns


def join_text(parts: list[Part]) -> str:
    """Return the text of a message without tool calls."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def truncate_conversation(
    render: Callable[[Sequence[conversations.Message]], list[int]],
    messages: Sequence[conversations.Message],
    context: int,
    max_tokens: int,
) -> tuple[list[int], int]:
    """Render a conversation, dropping the oldest turns if it is too long. Return the prompt and the number dropped.

    A question and its answer are dropped together; the system message and the last message stay. Room for the reply is
    reserved. Raises ApiError if the remaining messages fill the context.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    max_length = context - min(max_tokens, context // MAX_REPLY_FRACTION)

    def render_without(exchanges: int) -> list[int]:
        return render([*system, *turns[2 * exchanges :]])

    exchanges = range(len(turns) // 2)
    dropped = bisect.bisect_left(exchanges, True, key=lambda n: len(render_without(n)) <= max_length)
    prompt = render_without(dropped)
    if len(prompt) >= context:
        message = f"the last message has {len(prompt)} tokens, but the model's context is {context}: shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    return prompt, 2 * dropped
