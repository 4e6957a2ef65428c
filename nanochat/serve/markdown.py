"""Replies as Markdown on a terminal, while they are written."""

from itertools import dropwhile

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from nanochat.serve.writers import ReplyWriter

REDRAWS_A_SECOND = 8


class MarkdownWriter(ReplyWriter):
    """For a terminal: what is written is redrawn as it grows, a few times a second; tool calls are dim.

    Only the last block, such as a paragraph or a list, is redrawn. Those before it are printed for good: a reply
    longer than the screen scrolls as any text does, and stays in the terminal's history once.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.block = ""
        self.live: Live | None = None

    def write_text(self, text: str) -> None:
        self.block += text
        if self.live is None and self.block.strip():
            self.live = Live(
                get_renderable=lambda: render(self.block),
                console=self.console,
                refresh_per_second=REDRAWS_A_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self.live.start()
        if "\n" in text and (start := last_block(self.block)):
            done, self.block = self.block[:start], self.block[start:]
            self.console.print(render(done))  # above what is redrawn
            self.console.print()

    def write_step(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False, highlight=False)

    def end_line(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.block.strip():
            self.console.print(render(self.block))
        self.block = ""


class Blocks(Markdown):
    """rich's Markdown without the empty lines around some elements, and without the spaces that fill each line.

    With the cursor at the right margin, the ^C that a terminal shows would begin a line of which rich knows nothing.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rendered = super().__rich_console__(console, options)
        lines = [_trimmed(line) for line in Segment.split_lines(s for s in rendered if isinstance(s, Segment))]
        while lines and not lines[-1]:
            lines.pop()
        for line in dropwhile(lambda line: not line, lines):
            yield from line
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    """A line without the spaces at its end, but for those with a background."""
    while line and not (line[-1].style and line[-1].style.bgcolor):
        *line, last = line
        if text := last.text.rstrip():
            return [*line, Segment(text, last.style)]
    return line


def render(text: str) -> Markdown:
    """`text` for rich to print. The address of a link is shown: its words need not tell where it leads."""
    markdown = Blocks("", hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or []:
            if child.type == "softbreak":  # a model that begins a new line means it
                child.type = "hardbreak"
    return markdown


def last_block(text: str) -> int:
    """Where the last top-level block of `text` begins: those before it are complete, whatever comes."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    lines = text.split("\n")[: starts[-1] if starts else 0]
    return sum(len(line) + 1 for line in lines)


def _emphasis(state: StateInline, silent: bool) -> bool:
    """CommonMark's *emphasis*, but never inside a word: models write 2*3*4 more often than half a word in italics."""
    if state.src[state.pos] == "*":
        before = state.src[: state.pos].rstrip("*")[-1:]
        after = state.src[state.pos :].lstrip("*")[:1]
        if before.isalnum() and after.isalnum():
            return False
    return emphasis.tokenize(state, silent)


def dialect() -> MarkdownIt:
    """A parser of Markdown as models write it. Without HTML: the <int> of vector<int> is text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.inline.ruler.at("emphasis", _emphasis)
    return parser


_PARSER = dialect()
