"""Request bodies of the OpenAI API (https://platform.openai.com/docs/api-reference) and their validation.

Fields of other servers that would change the reply are refused by name (`REFUSED_FIELDS`); all other unknown fields are
ignored, and logged once.
"""

import bisect
import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StringConstraints,
    field_validator,
    model_validator,
)

from nanochat import conversations
from nanochat.conversations import Part
from nanochat.inference.json_constraint import JsonConstraint
from nanochat.inference.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.model_registry import ModelCard

log = logging.getLogger(__name__)
MAX_MESSAGES = 1000
MAX_TOKENS = 1_000_000
MAX_BIASES = 1000
MAX_LOGGED_FIELDS = 100
MAX_REPLIES_PER_REQUEST = 256
MAX_REPLIES = 16
MAX_REPLY_FRACTION = 4  # at most a quarter of the context is reserved for the reply


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON allows (`"\\ud83d"`) but UTF-8 does not, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, StringConstraints(strict=True), AfterValidator(_replace_surrogates)]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]
StopStrings = Annotated[
    list[StopString], BeforeValidator(lambda value: [value] if isinstance(value, str) else value, str | list[str])
]


@dataclass(frozen=True)
class GenerationRequest:
    """The replies that an API request asks for, whatever its format."""

    card: ModelCard
    prompts: list[tuple[list[int], SamplingParams]]  # one per reply
    num_prompt_tokens: int  # each prompt counts once, even if it gets several replies
    dropped_messages: int = 0  # oldest messages that did not fit in the context


TEXT_PARTS = ("text", "input_text", "output_text")  # the last two in /v1/responses


class ContentPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


def _to_parts(content: Any) -> Any:
    """Convert a message's content to a list of parts, for pydantic to validate."""
    if content is None or isinstance(content, str):
        content = [content] if content else []
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of parts")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError('must be a string or a list of parts such as {"type": "text", "text": "..."}')
        if part["type"] not in (*TEXT_PARTS, "python", "python_output"):
            raise ValueError(f"has a part of type {part['type'][:40]!r}, but this model reads text only")
    return [{**part, "type": "text"} if part["type"] in TEXT_PARTS else part for part in parts]


class ToolFunction(BaseModel):
    name: Text
    arguments: Any = ""  # JSON; Ollama's clients send an object


class ToolCall(BaseModel):
    function: ToolFunction


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[ContentPart], BeforeValidator(_to_parts, str | list[ContentPart] | None)] = []
    tool_calls: list[ToolCall] | None = None

    @property
    def turn_role(self) -> Literal["system", "user", "assistant"]:
        """The role in the chat format, in which the results of tools are part of the assistant's turn."""
        if self.role in ("developer", "system"):
            return "system"
        return "user" if self.role == "user" else "assistant"

    def parts(self) -> list[Part]:
        """Return the content in the chat format, where other tools look like the python tool."""
        parts: list[Part] = [{"type": part.type, "text": part.text} for part in self.content if part.text]
        if self.role in ("tool", "function"):
            return [{"type": "python_output", "text": join_text(parts)}]
        for call in self.tool_calls or []:
            arguments = call.function.arguments
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            parts.append({"type": "python", "text": f"{call.function.name}({text})"})
        return parts

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.role != "assistant" and any(part.type != "text" for part in self.content):
            raise ValueError("has a tool call, which only assistant messages can have")
        if self.role == "user" and "content" not in self.model_fields_set:
            raise ValueError("needs a content")
        return self


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None  # OpenAI: {"name": ..., "schema": ...}
    own_schema: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and "schema" not in (self.json_schema or {}) and self.own_schema is None:
            raise ValueError("needs a schema")
        return self


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = None


def _check_tool_choice(value: Any) -> Any:
    if value not in (None, "none", "auto"):
        raise ValueError('must be "auto" or "none", because this model decides itself when to call its own tool')
    return value


REFUSED_FIELDS = (
    "best_of suffix guided_regex guided_choice guided_grammar structured_outputs grammar json_schema regex ebnf "
    "chat_template documents images audio web_search_options prompt_embeds truncate_prompt_tokens prompt_logprobs "
    "bad_words allowed_token_ids logits_processors include_stop_str_in_output use_beam_search length_penalty typical_p "
    "mirostat dry_multiplier xtc_probability top_n_sigma dynatemp_range"
)
"""Fields of other servers that would change the reply, unless they are null, false, 0 or empty."""
HARMLESS_VALUES = {"best_of": 1, "length_penalty": 1, "typical_p": 1, "truncate_prompt_tokens": -1}
_ignored_fields: set[str] = set()  # logged already


class SamplingRequest(BaseModel):
    """Fields shared by both completion endpoints."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = Field(
        None,
        ge=-1,
        le=MAX_TOKENS,
        description="-1: up to the end of the context",
        validation_alias=AliasChoices("max_tokens", "n_predict", "num_predict"),  # OpenAI, llama.cpp, Ollama
    )
    min_tokens: Integer | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, le=1_000_000, description="-1, 0 or null: all tokens")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(
        None, ge=0.1, le=10, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63, description="-1 or null: random")
    stop: StopStrings | None = Field(
        None,
        max_length=MAX_STOP_STRINGS,
        validation_alias=AliasChoices("stop", "stop_sequences"),  # OpenAI, Anthropic
    )
    stop_token_ids: list[Integer] | None = Field(None, max_length=MAX_STOP_STRINGS)
    ignore_eos: StrictBool | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_REPLIES)
    response_format: ResponseFormat | None = None
    guided_json: Any = Field(None, description="a JSON schema")

    @model_validator(mode="after")
    def _check_unknown_fields(self) -> Self:
        unknown = self.model_extra or {}
        for name, value in unknown.items():
            if value and name in REFUSED_FIELDS.split() and value != HARMLESS_VALUES.get(name):
                raise ValueError(f"{name} is not supported: remove it from the request")
        new = {name[:40] for name in unknown} - _ignored_fields - set(REFUSED_FIELDS.split())
        if new and len(_ignored_fields) < MAX_LOGGED_FIELDS:
            _ignored_fields.update(new)
            log.warning("ignoring the unknown request fields %s (logged once)", ", ".join(map(repr, sorted(new))))
        return self

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def json_schema_text(self) -> str | None:
        """The JSON schema that the reply must match, None for plain text."""
        schema, format = self.guided_json, self.response_format
        if format and format.type != "text":
            schema = (format.json_schema or {}).get("schema") or format.own_schema or {"type": "object"}
        return schema if schema is None or isinstance(schema, str) else json.dumps(schema)

    def sampling_params(self, defaults: SamplingParams) -> list[SamplingParams]:
        """Return the parameters of each of the `n` replies. Fields that are not set take the server's defaults."""
        names = "max_tokens min_tokens temperature top_p min_p repetition_penalty frequency_penalty presence_penalty"
        given: dict[str, Any] = {name: value for name in names.split() if (value := getattr(self, name)) is not None}
        if "top_k" in self.model_fields_set:
            given["top_k"] = max(self.top_k or 0, 0) or None
        if self.max_tokens == -1:
            given["max_tokens"] = MAX_TOKENS
        if self.ignore_eos:
            given["min_tokens"] = MAX_TOKENS
        params = dataclasses.replace(
            defaults,
            **given,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=tuple((self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed in (None, -1) else self.seed % 2**63,
            constraint=partial(JsonConstraint, schema) if (schema := self.json_schema_text) else None,
            logprobs=self.num_logprobs,
        )
        return [params.child(i) for i in range(self.n or 1)]


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions. `tools` are accepted, but the model calls only its own python tool."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Integer | None = Field(
        None, ge=-1, le=MAX_TOKENS, validation_alias=AliasChoices("max_completion_tokens", "max_output_tokens")
    )
    logprobs: StrictBool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_check_tool_choice)] = None
    function_call: Annotated[Any, BeforeValidator(_check_tool_choice)] = None
    continue_final_message: StrictBool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for no limit, got 0")
        return value

    @model_validator(mode="after")
    def _check_reply(self) -> Self:
        self.max_tokens = self.max_completion_tokens or self.max_tokens  # the former is OpenAI's newer name
        if self.continue_final_message and self.messages[-1].turn_role != "assistant":
            raise ValueError("continue_final_message requires a last message of the assistant")
        return self

    def conversation(self) -> list[conversations.Message]:
        """Return the messages as turns; if the last one is the assistant's, the reply continues it."""
        turns = to_conversation(self.messages)
        if self.continue_final_message is False and turns[-1]["role"] == "assistant":
            turns.append({"role": "assistant", "content": ""})
        return turns


def _to_prompts(value: Any) -> list[str | list[int]]:
    """Convert a prompt to a list of texts and lists of token ids."""

    def is_prompt(value: Any) -> bool:
        is_tokens = isinstance(value, list) and value and all(type(token) is int for token in value)
        return isinstance(value, str) or bool(is_tokens)

    prompts = [value] if is_prompt(value) else value
    if not isinstance(prompts, list) or not prompts or not all(map(is_prompt, prompts)):
        raise ValueError("must be a string, a list of token ids, or a list of these")
    return [_replace_surrogates(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions: one or more prompts as text or token ids."""

    prompt: Annotated[list[Any], BeforeValidator(_to_prompts, str | list[str] | list[Integer] | list[list[Integer]])]
    echo: StrictBool | None = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


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


def to_conversation(messages: list[Message]) -> list[conversations.Message]:
    """Convert a request's messages to an optional system message, then turns of user and assistant.

    Consecutive messages of one role are merged. A later system message becomes part of the user's turn. Messages
    without content are dropped, except the user's. Raises ApiError if none is left.
    """
    turns: list[conversations.Message] = []
    for message in messages:
        role, parts = message.turn_role, message.parts()
        if role == "system" and turns and turns[-1]["role"] != "system":
            role = "user"
        if not parts and message.role != "user":
            continue
        content: str | list[Part] = parts if role == "assistant" else join_text(parts)
        if turns and turns[-1]["role"] == role:
            previous: Any = turns[-1]["content"]
            separator: Any = "\n\n" if role != "assistant" and previous and content else content[:0]
            turns[-1]["content"] = previous + separator + content
        else:
            turns.append({"role": role, "content": content})
    if not turns:
        raise ApiError(400, "messages must contain text", param="messages")
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

    What remains starts with a user's turn. The system message and the last user's turn stay, so that the prompt may
    still be too long. Room for the reply is reserved.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    max_length = context - min(max_tokens, context // MAX_REPLY_FRACTION)
    starts = [0, *(i for i, turn in enumerate(turns) if i and turn["role"] == "user")]

    def render_from(start: int) -> list[int]:
        return render([*system, *turns[start:]])

    start = starts[bisect.bisect_left(starts[:-1], True, key=lambda start: len(render_from(start)) <= max_length)]
    return render_from(start), start
