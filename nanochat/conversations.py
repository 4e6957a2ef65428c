"""Conversations in OpenAI's format: validation, and reading and writing of JSON Lines files.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user and
assistant in turn. An assistant's content may be a list of parts: text, python (a tool call), python_output.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from nanochat import paths
from nanochat.atomic import atomic_write
from nanochat.errors import UserError
from nanochat.locks import folder_lock

PartType = Literal["text", "python", "python_output"]


class Part(TypedDict):
    type: PartType
    text: str


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Conversation(TypedDict):
    messages: list[Message]


class Line(NamedTuple):
    """One line of a file, with either `conversation` or `problem` set."""

    number: int  # from 1
    conversation: Conversation | None
    problem: str | None


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
        return 'it is not an object with a list "messages"'
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
        return 'needs a "role": system, user or assistant'
    content = message.get("content")
    if isinstance(content, str):
        return None if content.strip() else "is empty"
    if not isinstance(content, list):
        return 'needs a "content": text or a list of parts'
    if message["role"] != "assistant":
        return "has a list of parts, allowed only for the assistant"
    if not content:
        return "is empty"
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "python", "python_output"):
            return 'has a part whose "type" is not text, python or python_output'
        if not isinstance(part.get("text"), str):
            return f'has a {part["type"]} part without "text"'
        if not part["text"].strip() and part["type"] != "python_output":  # a program may print nothing
            return f"has an empty {part['type']} part"
    return None


def scan(path: Path) -> Iterator[Line]:
    """Yield all lines of a JSON Lines file except blank ones. Raises UserError if the file cannot be read."""
    try:
        # Split at b"\n" only: str.splitlines would also split at U+2028 within a text.
        raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): run ./prepare.sh to create the default file") from None
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode())
            problem = find_problem(value)
        except json.JSONDecodeError as error:
            problem = f"it is not JSON ({error.msg} at column {error.colno})"
        except (ValueError, RecursionError) as error:  # not UTF-8, too many digits, brackets nested too deep
            problem = f"it is not JSON ({error})"
        yield Line(number, None if problem else value, problem)


def read(path: Path) -> list[Conversation]:
    """Read a JSON Lines file. Raises UserError at the first invalid line, and if the file is empty."""
    conversations = []
    for line in scan(path):
        if line.conversation is None:
            raise UserError(f"line {line.number} of {path} is invalid ({line.problem}): fix or remove it")
        conversations.append(line.conversation)
    if not conversations:
        raise UserError(f"{path} is empty: add one conversation per line, or delete it and run ./prepare.sh")
    return conversations


def append(path: Path, conversations: Iterable[Conversation]) -> None:
    """Append conversations to a file, creating it if needed. Existing lines, even invalid ones, are kept.

    Atomic. Raises UserError if the file cannot be written, ValueError on an invalid conversation.
    """
    lines = []
    for value in conversations:
        if problem := find_problem(value):
            raise ValueError(f"not a conversation: {problem}")
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    target = path.resolve()  # a link is kept
    locks = paths.base_dir() / "locks"
    try:
        for folder in (locks, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(locks):  # concurrent writers lose no lines
            old = target.read_bytes() if target.exists() else b""
            newline = b"\n" if old and not old.endswith(b"\n") else b""
            with atomic_write(target, "wb") as file:
                file.write(old + newline + "".join(lines).encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free some space or choose another folder") from None
