"""Printing a streamed reply: as plain text, or as Markdown that is redrawn while it grows."""

from itertools import dropwhile
from typing import IO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from nanochat.conversations import Part
from nanochat.inference.detokenizer import Delta, add_delta
from nanochat.serve.markdown import create_parser
from nanochat.units import printable

REFRESHES_PER_SECOND = 8
_PARSER = create_parser()


class PlainPrinter:
    """Prints text as it arrives, and each tool call with its result as `[python] 37*45 -> 1665`."""

    def __init__(self, out: IO[str]) -> None:
        self.parts: list[Part] = []
        self.out = out
        self.at_line_start = True

    def add(self, delta: Delta) -> None:
        if self._in_tool_call() and delta.type not in (self.parts[-1]["type"], "python_output"):
            self._end_tool_call()
        add_delta(self.parts, delta)
        if delta.type == "text":
            self.print_text(printable(delta.text))

    def end(self) -> None:
        """Print what is still held back and end the line."""
        if self._in_tool_call():
            self._end_tool_call()
        self.end_line()

    def print_text(self, text: str) -> None:
        """Print a piece of text; it can end inside a word."""
        if text:
            self.out.write(text)
            self.out.flush()
            self.at_line_start = text.endswith("\n")

    def print_tool_call(self, line: str) -> None:
        self.print_text(f"{line}\n")

    def end_line(self) -> None:
        """Start a new line, unless at the start of one."""
        if not self.at_line_start:
            self.print_text("\n")

    def _in_tool_call(self) -> bool:
        return bool(self.parts) and self.parts[-1]["type"] != "text"

    def _end_tool_call(self) -> None:
        *_, code, result = [{"type": "", "text": ""}, *self.parts]
        if result["type"] == "python":  # the reply ended inside the call
            code, result = result, {"type": "python_output", "text": "(not run)"}
        self.end_line()
        self.print_tool_call(f"[python] {one_line(code['text'])} -> {one_line(result['text'])}")


class MarkdownPrinter(PlainPrinter):
    """Markdown, redrawn several times per second while it grows.

    Only the last block, such as a paragraph or a list, is redrawn; earlier blocks are final. So a reply longer than the
    screen scrolls normally and appears only once in the terminal's history.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console.file)
        self.console = console
        self.block = ""
        self.live: Live | None = None

    def print_text(self, text: str) -> None:
        self.block += text
        if self.live is None and self.block.strip():
            self.live = Live(
                get_renderable=lambda: to_rich(self.block),
                console=self.console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self.live.start()
        if "\n" in text and (start := last_block_start(self.block)):
            finished, self.block = self.block[:start], self.block[start:]
            self.console.print(to_rich(finished))  # appears above the live block
            self.console.print()

    def print_tool_call(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False, highlight=False)

    def end_line(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.block.strip():
            self.console.print(to_rich(self.block))
        self.block = ""


class TrimmedMarkdown(Markdown):
    """rich's Markdown without empty lines at the start and end and without trailing spaces.

    With padded lines, the ^C that a terminal echoes would wrap to a new line that rich does not account for.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rendered = super().__rich_console__(console, options)
        lines = [_rstrip(line) for line in Segment.split_lines(s for s in rendered if isinstance(s, Segment))]
        while lines and not lines[-1]:
            lines.pop()
        for line in dropwhile(lambda line: not line, lines):
            yield from line
            yield Segment.line()


def _rstrip(line: list[Segment]) -> list[Segment]:
    """Remove trailing spaces, except those with a background color."""
    while line and not (line[-1].style and line[-1].style.bgcolor):
        *line, last = line
        if text := last.text.rstrip():
            return [*line, Segment(text, last.style)]
    return line


def to_rich(text: str) -> Markdown:
    """Parse Markdown for rich. Link addresses are shown, because the link's text can be misleading."""
    markdown = TrimmedMarkdown("", hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or []:
            if child.type == "softbreak":  # keep the model's line breaks
                child.type = "hardbreak"
    return markdown


def last_block_start(text: str) -> int:
    """Return where the last top-level block of `text` starts; blocks before it will not change."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    lines = text.split("\n")[: starts[-1] if starts else 0]
    return sum(len(line) + 1 for line in lines)


def one_line(code: str) -> str:
    return "; ".join(line.rstrip() for line in printable(code).strip().splitlines() if line.strip())
