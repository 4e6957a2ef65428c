"""View, check, extend and convert the identity conversations, or other conversations and problems with --file.

./view_identity_data.py                      show the first ones
./view_identity_data.py search "your name"
./view_identity_data.py add --user "Who built you?" --assistant "Ada did, and I am nanochat."
./view_identity_data.py validate --file sharegpt.json
./view_identity_data.py show --tokens --file sharegpt.json
./view_identity_data.py export --file sharegpt.json --output mine.jsonl
"""

import csv
import io
import json
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from nanochat import cli, conversation_files, paths
from nanochat.conversation_files import Line, find_problem
from nanochat.conversations import Conversation, Message, conversation
from nanochat.errors import UserError
from nanochat.tasks import problems
from nanochat.tasks.mixtures import load_task
from nanochat.tokenizer import Rendered, Tokenizer
from nanochat.train import checkpoint

COLORS = {"system": "magenta", "user": "cyan", "assistant": "green"}
TRAINED, READ, LOST = "trained on", "only read", "beyond the context, lost"
LEGEND = {TRAINED: ("black on green", "[{}]"), READ: ("none", "{}"), LOST: ("strike red", "~{}~")}
"""Styles of the tokens, and their marks where there are no colors."""
console = Console()


@dataclass
class Show:
    """Show the conversations."""

    limit: int = 20
    """maximum number of conversations; 0 for all"""
    tokens: bool = False
    """show tokens as the model sees them, colored: trained on, only read, or beyond the context and lost"""


@dataclass
class Search:
    """Show the conversations that contain the given text, ignoring case."""

    text: tyro.conf.Positional[str]


@dataclass
class Count:
    """Count conversations, turns, words and tokens, and what does not fit the context."""


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
    """new file, ending in .jsonl (one conversation per line, as training reads it), .json, .csv or .md"""


@dataclass
class Options:
    """View, check, extend and convert conversations, by default those about the model's identity."""

    command: Show | Search | Count | Validate | Add | Export = field(default_factory=Show)
    file: str | None = None
    """.jsonl or .json file, a folder of them, or owner/name on the hub, in any format that docs/your-own-data.md lists;
    default: identity_conversations.jsonl in the base directory"""
    context: int | None = None
    """tokens that the model sees at once; default: as the newest base model, or 2048"""


DEMO = Options()


def main(options: Options) -> None:
    """Run the command, then report invalid lines, which are skipped but never removed from the file."""
    path = Path(options.file or paths.identity_file()).expanduser()
    command = options.command
    if options.file is None and not path.exists():
        raise UserError(f"{path} does not exist: run ./prepare.sh to create the default file, or pass --file")
    if isinstance(command, Add):
        add(path, command)
    lines = read_lines(options.file) if options.file else list(conversation_files.scan(path))
    if not lines:
        raise UserError(f"{path} is empty: add one conversation per line")
    invalid = [line for line in lines if line.conversation is None]
    match command:
        case Show(limit=limit):
            show(lines[:limit] if limit > 0 else lines, sequence_len(options) if command.tokens else None)
            if 0 < limit < len(lines):
                console.print(f"{limit} of {len(lines)} lines; show --limit 0 for all", style="dim")
        case Search(text=text):
            found = [line for line in lines if line.conversation and contains(line.conversation, text)]
            show(found)
            console.print(Text(f"{len(found)} of {len(lines)} lines contain {text!r}", style="dim"))
        case Count():
            count([line.conversation for line in lines if line.conversation], sequence_len(options))
        case Export(output=output) if not invalid:
            export([line.conversation for line in lines if line.conversation], output)
    if invalid:
        for line in invalid:
            console.print(Text(f"{place(line)}: {line.problem}", style="red"))
        note = ", nothing was exported" if isinstance(command, Export) else ""
        raise UserError(f"{len(invalid)} of {len(lines)} lines of {path} are invalid{note}: fix them in an editor")
    if isinstance(command, Validate):
        console.print(f"all {len(lines)} lines are valid")


def read_lines(name: str) -> list[Line]:
    """Read the file or folder `name`, with a check of graders, or the dataset `name` of the hub."""
    if Path(name).expanduser().exists() or Path(name).suffix:
        path, check = Path(name).expanduser(), problems.find_problem
        return list(conversation_files.scan(path, lambda row: check(row) if "grader" in row else None))
    rows = load_task(name, graded=False)
    return [Line(Path(name), number, row, None) for number, row in enumerate(rows, start=1)]


def sequence_len(options: Options) -> int:
    """The context of --context, of the newest base model, or of the default one."""
    newest = checkpoint.newest("base")
    return options.context or (newest.config.sequence_len if newest else 2048)


def place(line: Line) -> str:
    """Line number, preceded by the name of its file unless that is the identity file."""
    return f"line {line.number}" if line.file == paths.identity_file() else f"{line.file.name} line {line.number}"


def add(path: Path, command: Add) -> None:
    """Append one conversation of two turns."""
    if path.suffix != ".jsonl":
        raise UserError(f"--file must end in .jsonl to add to it, got {path}: export to such a file first")
    new = conversation(command.user, command.assistant)
    if problem := find_problem(new):
        raise UserError(f"--user and --assistant must not be empty ({problem})")
    conversation_files.append(path, [new])
    console.print(Text(f"added to {path}"))


def show(lines: list[Line], context: int | None = None) -> None:
    """Print each conversation in a box with its line number; with `context`, its tokens."""
    tokenizer = Tokenizer.load(paths.tokenizer_dir()) if context else None
    if context:
        console.print(Text("  ").join(styled(kind, kind) for kind in LEGEND))
    for line in lines:
        if line.conversation is None:
            continue
        body = Text()
        if tokenizer and context:
            body = as_tokens(tokenizer.render_conversation(line.conversation), tokenizer, context)
        for message in [] if tokenizer else line.conversation["messages"]:
            body.append(f"{message['role']}  ", style=f"bold {COLORS[message['role']]}")
            body.append(f"{as_text(message)}\n")
        body.rstrip()
        console.print(Panel(body, title=place(line), title_align="left", border_style="dim"))


def contains(conversation: Conversation, text: str) -> bool:
    """Return True if any turn contains `text`, ignoring case."""
    return any(text.casefold() in as_text(message).casefold() for message in conversation["messages"])


def as_tokens(rendered: Rendered, tokenizer: Tokenizer, context: int) -> Text:
    """The text of the tokens, in the colors of LEGEND."""
    kinds = [LOST if i >= context else TRAINED if mask else READ for i, mask in enumerate(rendered.mask)]
    body = Text()
    for kind, run in groupby(zip(kinds, rendered.ids, strict=True), key=itemgetter(0)):
        body.append_text(styled(tokenizer.decode([token for _, token in run]), kind))
    return body


def styled(text: str, kind: str) -> Text:
    style, mark = LEGEND[kind]
    return Text(text if console.color_system else mark.format(text), style)


def count_tokens(rows: list[Conversation], context: int) -> None:
    """Print the number of tokens, and of those that are trained on or do not fit the context."""
    if not paths.tokenizer_dir().exists():
        console.print("no tokenizer yet: run ./prepare.sh to count tokens", style="dim")
        return
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    rendered = [tokenizer.render_conversation(row) for row in rows]
    lengths, trained = [len(row.ids) for row in rendered], sum(sum(row.mask[:context]) for row in rendered)
    longer = [length - context for length in lengths if length > context]
    console.print(
        f"{sum(lengths):,} tokens, {trained:,} of them trained on in SFT; the longest conversation has "
        f"{max(lengths, default=0):,}"
    )
    console.print(
        f"{len(longer):,} conversations are longer than the context of {context:,} tokens: {sum(longer):,} tokens at "
        "their ends are lost"
    )


def count(rows: list[Conversation], context: int) -> None:
    """Print the number of turns and words by role, and of tokens."""
    table = Table("role", *(Column(name, justify="right") for name in ("turns", "words", "words per turn")))
    for role in COLORS:
        sizes = [len(as_text(m).split()) for row in rows for m in row["messages"] if m["role"] == role]
        if sizes:
            table.add_row(role, f"{len(sizes):,}", f"{sum(sizes):,}", f"{sum(sizes) / len(sizes):.1f}")
    console.print(f"{len(rows):,} conversations")
    console.print(table)
    count_tokens(rows, context)


def export(rows: list[Conversation], output: Path) -> None:
    """Write all conversations to `output`, which must not exist, in the format of its suffix."""
    formats = {".jsonl": as_json_lines, ".json": as_json, ".csv": as_csv, ".md": as_markdown}
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


def as_json_lines(rows: list[Conversation]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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
