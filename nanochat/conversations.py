"""Conversations in OpenAI's format: what makes one valid, and JSON Lines files of them.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: perhaps a system message, then user and
assistant in turn. An assistant's content may be a list of parts: text, python (a tool call), python_output.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

from nanochat.errors import UserError

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
    """One line of a file: its conversation, or the problem that keeps it from being one."""

    number: int  # counted from 1
    conversation: Conversation | None
    problem: str | None


def conversation(*turns: str | list[Part]) -> Conversation:
    """A conversation of these turns, the user's first."""
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def text_of(message: Message) -> str:
    """What a message says to its reader: its text without tool calls and their output."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def find_problem(value: Any) -> str | None:
    """Why `value` is not a conversation, in one sentence; None if it is one."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        return 'it is not an object with a list of "messages"'
    messages = value["messages"]
    for i, message in enumerate(messages):
        if problem := _problem_in_message(message):
            return f"message {i + 1} {problem}"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for i, role in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if role != expected:
            position = i + 1 + len(roles) - len(turns)
            return f"message {position} is from the {role} where the {expected} has the turn"
    if len(turns) < 2:
        return "it needs at least one message of the user and one of the assistant"
    return None


def _problem_in_message(message: Any) -> str | None:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        return 'has no "role" that is system, user or assistant'
    content = message.get("content")
    if isinstance(content, str):
        return None if content.strip() else "is empty"
    if not isinstance(content, list):
        return 'has no "content" that is text or a list of parts'
    if message["role"] != "assistant":
        return "has parts, which only the assistant may have"
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
    """Every line of a JSON Lines file that is not blank, good or broken. Raises UserError if it cannot be read."""
    try:
        # Split at b"\n" only: str.splitlines would also cut inside a text that holds U+2028.
        raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): ./prepare.sh makes the default one") from None
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode())
        except json.JSONDecodeError as error:
            yield Line(number, None, f"it is not JSON ({error.msg} at column {error.colno})")
        except UnicodeDecodeError:
            yield Line(number, None, "it is not UTF-8 text")
        except (ValueError, RecursionError):  # a number of too many digits, brackets nested too deep
            yield Line(number, None, "it is not JSON that can be read")
        else:
            problem = find_problem(value)
            yield Line(number, None if problem else cast(Conversation, value), problem)


def read(path: Path) -> list[Conversation]:
    """The conversations of a JSON Lines file. Raises UserError at the first broken line, and on an empty file."""
    conversations = []
    for line in scan(path):
        if line.conversation is None:
            raise UserError(f"line {line.number} of {path} is broken, {line.problem}: mend or remove that line")
        conversations.append(line.conversation)
    if not conversations:
        raise UserError(f"{path} holds no conversation: add one a line, or delete it and run ./prepare.sh")
    return conversations


def append(path: Path, conversations: Iterable[Conversation]) -> None:
    """Add conversations at the end of a file, which is made if it is absent.

    The lines already there, broken ones too, stay as they are byte for byte; a crash or a full disk leaves the
    old file. Raises UserError if the file cannot be written, ValueError on what is not a conversation.
    """
    addition = _encode(conversations)
    with _exclusive(path) as target:
        old = target.read_bytes() if target.exists() else b""
        newline = b"\n" if old and not old.endswith(b"\n") else b""
        _replace(target, old + newline + addition)


def write_if_absent(path: Path, conversations: Iterable[Conversation]) -> bool:
    """Make a file of these conversations unless one is there; whether it was made. Raises as `append` does."""
    with _exclusive(path) as target:
        if target.exists():
            return False
        _replace(target, _encode(conversations))
        return True


def _encode(conversations: Iterable[Conversation]) -> bytes:
    lines = []
    for value in conversations:
        if problem := find_problem(value):
            raise ValueError(f"not a conversation: {problem}")
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[Path]:
    """Hold a lock on the folder of `path`, links followed, so that two writers cannot lose each other's lines."""
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield target
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): free some space or choose a place you can write to"
        ) from None


def _replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all, also when the power fails."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, file.name)
            else:
                os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
