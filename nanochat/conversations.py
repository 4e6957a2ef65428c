"""Conversations in OpenAI's format.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user and
assistant in turn. An assistant's content may be a list of parts: text, python (a tool call), python_output.
"""

from typing import Any, Literal, NotRequired, TypedDict

PartType = Literal["text", "python", "python_output"]


class Part(TypedDict):
    type: PartType
    text: str


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Conversation(TypedDict):
    messages: list[Message]
    grader: NotRequired[str]  # how a reply in place of the last message is graded (nanochat.tasks.problems)
    rule: NotRequired[str]  # the grader's pattern or expression


PAIRS = {"instruction": "output", "prompt": "completion", "question": "answer"}
"""Fields of a user's message and its answer in formats of one turn."""


def conversation(*turns: str | list[Part]) -> Conversation:
    """Build a conversation from alternating turns, starting with the user's."""
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def text_of(message: Message) -> str:
    """Return a message's text without tool calls and their output."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def find_problem(value: Any) -> str | None:
    """Return the reason why `value` is not a valid conversation, or None if it is."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        pairs = (f"{asked}/{answered}" for asked, answered in PAIRS.items())
        return f'it is not an object with a list "messages" or "conversations", or with {", ".join(pairs)}'
    expected = "user"
    for i, message in enumerate(value["messages"]):
        if problem := _problem_in_message(message):
            return f"message {i + 1} {problem}"
        if i == 0 and message["role"] == "system":
            continue
        if message["role"] != expected:
            return f"message {i + 1} is from the {message['role']}, expected the {expected}"
        expected = "assistant" if expected == "user" else "user"
    if "assistant" not in [message["role"] for message in value["messages"]]:
        return "it needs at least one user message and one assistant message"
    return None


def _problem_in_message(message: Any) -> str | None:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        role = message.get("role") if isinstance(message, dict) else None
        return f'needs a "role": system, user or assistant{"" if role is None else f", not {role!r}"[:80]}'
    content = message.get("content")
    if isinstance(content, str):
        return None if content.strip() else "is empty"
    if not isinstance(content, list):
        return 'needs a "content": text or a list of parts'
    if message["role"] != "assistant":
        return "has a list of parts, allowed only for the assistant"
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in ("text", "python", "python_output") or not isinstance(text, str):
            return 'has a part that is not {"type": text, python or python_output, "text": text}'
        if not text.strip() and kind != "python_output":  # a program may print nothing
            return f"has an empty {kind} part"
    return None if content else "is empty"
