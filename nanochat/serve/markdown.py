"""Markdown to HTML for the chat page, with highlighted code and MathML formulas; safe for untrusted text.

Runs on the server instead of in the browser, so that the page needs no third-party scripts. HTML is escaped, links
are restricted to safe schemes, and images, which would be fetched from other hosts, become links.
"""

import html
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.rules_inline import StateInline, emphasis
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from math_core import LatexError, LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin
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


def to_html(text: str) -> str:
    """Convert Markdown to HTML. Works on incomplete text, such as an unclosed code block."""
    return _MARKDOWN.render(text) if len(text) <= MAX_MARKDOWN else f"<pre>{html.escape(text)}</pre>"


def code_css() -> str:
    """Return the style sheet for highlighted code, light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs("pre code") for style in (LIGHT_STYLE, DARK_STYLE))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\npre code {{ background: none }}\n"


def create_parser() -> MarkdownIt:
    """Create a parser for Markdown as models write it. Without HTML: the <int> of vector<int> is text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
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
        return _MATH.convert_with_local_state(token.content, displaystyle="block" in token.type)
    except LatexError:  # invalid or incomplete
        return f"<code>{html.escape(token.content)}</code>"


def _bracketed_formula(state: StateInline, silent: bool) -> bool:
    """Parse LaTeX's \\( \\) and \\[ \\], which models write as often as dollars."""
    opening = state.src[state.pos : state.pos + 2]
    if opening not in ("\\(", "\\["):
        return False
    end = state.src.find("\\)" if opening == "\\(" else "\\]", state.pos + 2, state.pos + MAX_FORMULA)
    if end < 0:
        return False
    if not silent:
        token = state.push("math_inline" if opening == "\\(" else "math_block", "math", 0)
        token.content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


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
_MARKDOWN.use(dollarmath_plugin, allow_space=False, allow_digits=False)  # "$5 and $10" is not a formula
_MARKDOWN.inline.ruler.before("escape", "bracketed_formula", _bracketed_formula)
for name in ("math_inline", "math_inline_double", "math_block", "math_block_label", "math_block_end"):
    _MARKDOWN.add_render_rule(name, _formula)
_MARKDOWN.add_render_rule("link_open", _link)
_MARKDOWN.add_render_rule("image", _image)
