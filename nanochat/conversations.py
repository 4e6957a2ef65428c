"""Conversations in OpenAI's format.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user and
assistant in turn. An assistant's content may be a list of parts: text, python (a tool call), python_output.
"""

from typing import Literal, NotRequired, TypedDict

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


def conversation(*turns: str | list[Part]) -> Conversation:
    """Build a conversation from alternating turns, starting with the user's."""
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def text_of(message: Message) -> str:
    """Return a message's text without tool calls and their output."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
