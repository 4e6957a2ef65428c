"""View, check, extend and export the identity conversations.

./view_identity_data.py                      show the first ones
./view_identity_data.py search "your name"
./view_identity_data.py add --user "Who built you?" --assistant "Ada did, and I am nanochat."
./view_identity_data.py --demo export --output identity.csv
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from nanochat import cli, conversations, paths
from nanochat.conversations import Conversation, Line, Message, conversation
from nanochat.errors import UserError

COLORS = {"system": "magenta", "user": "cyan", "assistant": "green"}
console = Console()


@dataclass
class Show:
    """Show the conversations."""

    limit: int = 20
    """maximum number of conversations; 0 for all"""


@dataclass
class Search:
    """Show the conversations that contain the given text, ignoring case."""

    text: tyro.conf.Positional[str]


@dataclass
class Count:
    """Count conversations, turns and words."""


@dataclass
class Validate:
    """Check every line."""


@dataclass
class Add:
    """Add a conversation at the end of the file."""

    user: str
    """the user's message"""
    assistant: str
    """the model's answer"""


@dataclass
class Export:
    """Write the conversations in another format."""

    output: Path
    """new file, ending in .json, .csv or .md"""


@dataclass
class Options:
    """View, check, extend and export the identity conversations."""

    command: Show | Search | Count | Validate | Add | Export = field(default_factory=Show)
    file: Path | None = None
    """JSON Lines file; default: identity_conversations.jsonl in the base directory"""


DEMO = Options()


def main(options: Options) -> None:
    """Run the command, then report invalid lines, which are skipped but never removed from the file."""
    path = options.file or paths.identity_file()
    command = options.command
    if not path.exists() and not (isinstance(command, Add) and options.file):
        raise UserError(f"{path} does not exist: run ./prepare.sh to create the default file, or pass --file")
    if isinstance(command, Add):
        add(path, command)
    lines = list(conversations.scan(path))
    invalid = [line for line in lines if line.conversation is None]
    match command:
        case Show(limit=limit):
            show(lines[:limit] if limit > 0 else lines)
            if 0 < limit < len(lines):
                console.print(f"{limit} of {len(lines)} lines; show --limit 0 for all", style="dim")
        case Search(text=text):
            found = [line for line in lines if line.conversation and contains(line.conversation, text)]
            show(found)
            console.print(Text(f"{len(found)} of {len(lines)} lines contain {text!r}", style="dim"))
        case Count():
            count([line.conversation for line in lines if line.conversation])
        case Export(output=output) if not invalid:
            export([line.conversation for line in lines if line.conversation], output)
    if invalid:
        for line in invalid:
            console.print(Text(f"line {line.number}: {line.problem}", style="red"))
        note = ", nothing was exported" if isinstance(command, Export) else ""
        raise UserError(f"{len(invalid)} of {len(lines)} lines of {path} are invalid{note}: fix them in an editor")
    if isinstance(command, Validate):
        console.print(f"all {len(lines)} lines are valid")


def add(path: Path, command: Add) -> None:
    """Append one conversation of two turns."""
    new = conversation(command.user, command.assistant)
    if problem := conversations.find_problem(new):
        raise UserError(f"--user and --assistant must not be empty ({problem})")
    conversations.append(path, [new])
    console.print(Text(f"added to {path}"))


def show(lines: list[Line]) -> None:
    """Print each conversation in a box with its line number."""
    for line in lines:
        if line.conversation is None:
            continue
        body = Text()
        for message in line.conversation["messages"]:
            body.append(f"{message['role']}  ", style=f"bold {COLORS[message['role']]}")
            body.append(f"{as_text(message)}\n")
        body.right_crop(1)
        console.print(Panel(body, title=f"line {line.number}", title_align="left", border_style="dim"))


def contains(conversation: Conversation, text: str) -> bool:
    """Return True if any turn contains `text`, ignoring case."""
    return any(text.casefold() in as_text(message).casefold() for message in conversation["messages"])


def count(rows: list[Conversation]) -> None:
    """Print the number of turns and words by role."""
    table = Table("role", *(Column(name, justify="right") for name in ("turns", "words", "words per turn")))
    for role in COLORS:
        sizes = [len(as_text(m).split()) for row in rows for m in row["messages"] if m["role"] == role]
        if sizes:
            table.add_row(role, f"{len(sizes):,}", f"{sum(sizes):,}", f"{sum(sizes) / len(sizes):.1f}")
    console.print(f"{len(rows):,} conversations")
    console.print(table)


def export(rows: list[Conversation], output: Path) -> None:
    """Write all conversations to `output`, which must not exist, in the format of its suffix."""
    formats = {".json": as_json, ".csv": as_csv, ".md": as_markdown}
    if output.suffix not in formats:
        raise UserError(f"--output must end in {', '.join(formats)}, got {output}")
    try:
        with output.open("x", encoding="utf-8", newline="") as file:
            file.write(formats[output.suffix](rows))
    except FileExistsError:
        raise UserError(f"{output} already exists: choose another --output") from None
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror}): choose another --output") from None
    console.print(Text(f"{len(rows):,} conversations written to {output}"))


def as_json(rows: list[Conversation]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"


def as_csv(rows: list[Conversation]) -> str:
    """One row per turn: the conversation's number, the role, the text."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["conversation", "role", "content"])
    for number, row in enumerate(rows, start=1):
        writer.writerows([number, message["role"], as_text(message)] for message in row["messages"])
    return text.getvalue()


def as_markdown(rows: list[Conversation]) -> str:
    text = "# Conversations\n"
    for number, row in enumerate(rows, start=1):
        text += f"\n## {number}\n"
        for message in row["messages"]:
            text += f"\n**{message['role']}:** {as_text(message)}\n"
    return text


def as_text(message: Message) -> str:
    """Return the message as one text, with tool calls marked."""
    content = message["content"]
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "[python: {}]", "python_output": "[output: {}]"}
    return " ".join(marks[part["type"]].format(part["text"]) for part in content)


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
