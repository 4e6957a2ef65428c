"""Check conversations, read them from JSON Lines and JSON files in OpenAI's and other formats, and append to
such files.

ShareGPT, Alpaca, prompt/completion and question/answer are converted when they are read.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import paths
from nanochat.atomic import atomic_write
from nanochat.conversations import Conversation
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.units import format_bytes
from nanochat.untrusted import MAX_LINE_BYTES, reading, skip_line

ROLES = {"human": "user", "developer": "system"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
"""Names of roles in other formats."""
PAIRS = {"instruction": "output", "prompt": "completion", "question": "answer"}
"""Fields of a user's message and its answer in formats of one turn."""


class Line(NamedTuple):
    """One line of a file, or one item of a JSON array, with either `conversation` or `problem` set."""

    file: Path
    number: int  # from 1
    conversation: Conversation | None
    problem: str | None


def convert(record: Any) -> Any:
    """Return a record of a known format in ours, without fields that are not used; any other value as it is."""
    if not isinstance(record, dict):
        return record
    messages = record.get("messages", record.get("conversations"))
    for asked, answered in PAIRS.items():
        if messages is None and asked in record and answered in record:
            context = f"\n\n{record['input']}" if asked == "instruction" and record.get("input") else ""
            messages = _turn("user", record[asked], context) + _turn("assistant", record[answered])
    if not isinstance(messages, list):
        return record
    if record.get("system"):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    converted: dict[str, Any] = {"messages": [_message(m) for m in messages]}
    if converted["messages"][:1] == [{"role": "system", "content": ""}]:
        del converted["messages"][0]
    return converted | {name: record[name] for name in ("grader", "rule") if name in record}


def _turn(role: str, content: Any, context: str = "") -> list[Any]:
    if isinstance(content, list) and all(isinstance(item, dict) and "role" in item for item in content):
        return content  # the messages of one side
    return [{"role": role, "content": f"{content}{context}" if isinstance(content, str | int | float) else content}]


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role != "assistant" and isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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


def scan(path: Path, check: Callable[[Conversation], str | None] = lambda _: None) -> Iterator[Line]:
    """Yield the lines of a file, or of all .jsonl and .json files of a folder, except blank ones.

    `check` returns the reason why a valid conversation is not usable, or None. Raises UserError if `path` is not
    readable or is a folder without such files.
    """
    files = sorted(f for f in path.rglob("*.json*") if f.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no .jsonl or .json files: choose another folder")
    for file in files:
        for number, record in enumerate(_records(file), start=1):
            if isinstance(record, bytes) and not record.strip():
                continue
            if isinstance(record, bytes) and len(record) > MAX_LINE_BYTES:
                yield Line(file, number, None, f"it is longer than {format_bytes(MAX_LINE_BYTES)}")
                continue
            try:
                value = convert(json.loads(record.decode("utf-8-sig")) if isinstance(record, bytes) else record)
                json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half a surrogate pair
                problem = find_problem(value) or check(value)
            except json.JSONDecodeError as error:
                problem = f"it is not JSON ({error.msg} at column {error.colno})"
            except (ValueError, RecursionError) as error:  # not UTF-8, too many digits, brackets nested too deep
                problem = f"it is not JSON in UTF-8 ({error})"
            yield Line(file, number, None if problem else value, problem)


def _records(file: Path) -> Iterator[Any]:
    """Yield the items of a JSON array, or the lines of other files: bytes that end at b"\\n", not at U+2028."""
    with reading(file, "run ./prepare.sh to create it" if file == paths.identity_file() else "check its name"):
        if file.suffix == ".json":
            with contextlib.suppress(ValueError, RecursionError):
                whole = json.loads(file.read_bytes())
                yield from whole if isinstance(whole, list) else [whole]
                return
        with open(file, "rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                yield line
                if not line.endswith(b"\n"):
                    skip_line(lines)


def read(path: Path, check: Callable[[Conversation], str | None] = lambda _: None) -> list[Conversation]:
    """Read a file or folder as `scan` does. Raises UserError at the first invalid line, and if there are none."""
    conversations = []
    for line in scan(path, check):
        if line.conversation is None:
            raise UserError(f"line {line.number} of {line.file} is invalid ({line.problem}): fix or remove it")
        conversations.append(line.conversation)
    if not conversations:
        fix = ", or delete it and run ./prepare.sh" if path == paths.identity_file() else ""
        raise UserError(f"{path} is empty: add one conversation per line{fix}")
    return conversations


def append(path: Path, conversations: Iterable[Conversation]) -> None:
    """Append conversations to a file, creating it if needed. Existing lines, even invalid ones, are kept.

    Atomic. Raises UserError if writing the file fails, ValueError on an invalid conversation.
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
