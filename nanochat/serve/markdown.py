"""Markdown to HTML for the chat page, with highlighted code and MathML formulas; safe for untrusted text.

Runs on the server instead of in the browser, so that the page needs no third-party scripts. HTML is escaped, links
are restricted to safe schemes, and images, which would be fetched from other hosts, become links.
"""

import html
import re
from bisect import bisect_left
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, emphasis
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from math_core import LatexError, LatexToMathML
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_HIGHLIGHTED = 2000
"""Characters per code block; longer ones are not highlighted because some lexers take quadratic time."""
LANGUAGES = {
    "bash", "c", "c++", "console", "cpp", "css", "diff", "go", "html", "java", "javascript", "js", "json", "kotlin",
    "latex", "lua", "make", "php", "python", "py", "r", "ruby", "rust", "sh",
    "shell", "sql", "swift", "tex", "toml", "ts", "typescript", "xml", "yaml",
}  # fmt: skip
MAX_FORMULA = 1000  # characters per formula: math-core converts 3,000 nested braces, but overflows the stack at 10,000
MAX_MARKDOWN = 20_000
"""Characters per text; longer texts are shown as plain text because some Markdown rules take quadratic time."""
LIGHT_STYLE, DARK_STYLE = "xcode", "github-dark"
LINK_ATTRIBUTES = {"target": "_blank", "rel": "noopener noreferrer nofollow"}
LINK_SCHEMES = ("http://", "https://", "mailto:")  # others start programs, such as vscode: and intent:
DELIMITERS = {"$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}  # of formulas


def to_html(text: str) -> str:
    """Convert Markdown to HTML. Works on incomplete text, such as an unclosed code block."""
    return _MARKDOWN.render(text) if len(text) <= MAX_MARKDOWN else to_plain_html(text)


def to_plain_html(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def code_css() -> str:
    """Return the style sheet for highlighted code, light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs("pre code") for style in (LIGHT_STYLE, DARK_STYLE))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\npre code {{ background: none }}\n"


class _Parser(MarkdownIt):
    def validateLink(self, url: str) -> bool:  # noqa: N802  # the name of the method it overrides
        return url.lower().startswith(LINK_SCHEMES)


def create_parser() -> MarkdownIt:
    """Create a parser for Markdown as models write it. Without HTML: the <int> of vector<int> is text."""
    parser = _Parser("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.inline.ruler.at("emphasis", _emphasis)
    return parser


def _emphasis(state: StateInline, silent: bool) -> bool:
    """CommonMark's emphasis, except inside words: models write 2*3*4 more often than partly italic words."""
    if state.src[state.pos] == "*":
        before = state.src[: state.pos].rstrip("*")[-1:]
        after = state.src[state.pos :].lstrip("*")[:1]
        if before.isalnum() and after.isalnum():
            return False
    return emphasis.tokenize(state, silent)


def _highlight(code: str, language: str, attributes: str) -> str:
    if language.lower() not in LANGUAGES or len(code) > MAX_HIGHLIGHTED:
        return ""  # markdown-it then escapes the code
    try:
        return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True))
    except ClassNotFound:
        return ""


def _formula(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[at]
    try:
        if len(token.content) > MAX_FORMULA:
            raise LatexError
        return _without_style(_MATH.convert_with_local_state(token.content, displaystyle="block" in token.type))
    except LatexError:  # invalid or incomplete
        return f"<code>{html.escape(token.content)}</code>"


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """Parse $ $, $$ $$, \\( \\) and \\[ \\]. A space or a digit next to a single dollar makes it a price."""
    src, opening = state.src, next((one for one in DELIMITERS if state.src.startswith(one, state.pos)), "")
    start = state.pos + len(opening)
    end = _find_closing(src, opening, start)
    content = src[start:end]
    is_price = src[start - 2 : start - 1].isdigit() or src[end + 1 : end + 2].isdigit() or content != content.strip()
    if end < 0 or not content.strip() or (opening == "$" and is_price):
        return False
    if not silent:
        token = state.push("math_block" if opening in ("$$", "\\[") else "math_inline", "math", 0)
        token.content = content
    state.pos = end + len(opening)
    return True


def _block_formula(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Parse $$ $$ and \\[ \\] that start and end a line. Lines between them may look like other Markdown."""
    start = state.bMarks[start_line] + state.tShift[start_line]
    opening = state.src[start : start + 2]
    end = _find_closing(state.src, opening, start + 2) if opening in ("$$", "\\[") else -1
    last_line = bisect_left(state.eMarks, end + 2, start_line)
    if end < 0 or last_line >= end_line or state.src[end + 2 : state.eMarks[last_line]].strip():
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.content = state.getLines(start_line, last_line + 1, state.blkIndent, False).strip()[2:-2]
        state.line = last_line + 1
    return True


def _find_closing(text: str, opening: str, start: int) -> int:
    """Return where the closing delimiter of a formula is, -1 if it is not within MAX_FORMULA characters."""
    closing, end = DELIMITERS.get(opening), start - 1
    while closing and (end := text.find(closing, end + 1, start + MAX_FORMULA)) >= 0:
        if closing[0] == "\\" or text[end - 1] != "\\":  # not an escaped dollar
            return end
    return -1


def _table_cell(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    return _without_style(self.renderToken(tokens, at, options, env))  # type: ignore[attr-defined]  # as in _link


def _without_style(tags: str) -> str:
    """Rename style attributes, which the page's Content-Security-Policy forbids; turn.js applies them."""
    return re.sub(r'(<[^>]*) style="', r'\1 data-style="', tags)


def _link(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    tokens[at].attrs.update(LINK_ATTRIBUTES)
    return self.renderToken(tokens, at, options, env)  # type: ignore[attr-defined]  # missing in the protocol


def _image(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[at]
    attributes = {"href": token.attrs["src"], **LINK_ATTRIBUTES}
    opening = " ".join(f'{name}="{html.escape(str(value))}"' for name, value in attributes.items())
    return f"<a {opening}>{html.escape(token.content or str(token.attrs['src']))}</a>"


_MATH = LatexToMathML()
_MARKDOWN = create_parser()
_MARKDOWN.options.update({"highlight": _highlight, "breaks": True})  # keep the model's line breaks
_MARKDOWN.inline.ruler.before("escape", "inline_formula", _inline_formula)
_MARKDOWN.block.ruler.before("fence", "block_formula", _block_formula, {"alt": ["paragraph", "blockquote", "list"]})
for name in ("math_inline", "math_block"):
    _MARKDOWN.add_render_rule(name, _formula)
for name in ("th_open", "td_open"):
    _MARKDOWN.add_render_rule(name, _table_cell)
_MARKDOWN.add_render_rule("link_open", _link)
_MARKDOWN.add_render_rule("image", _image)
