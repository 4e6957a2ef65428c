"""Markdown as HTML for the chat page: code in colours, formulas as MathML, and nothing that the model could smuggle in.

It is made here and not in the browser because the libraries are here already and are Python's: the page needs no
script of others. No markup of the text gets through, links lead only where a browser may go, and images, which would
be fetched from elsewhere, become links.
"""

import html
from collections.abc import Sequence

from markdown_it.renderer import RendererProtocol
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from math_core import LatexError, LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from nanochat.serve.markdown import dialect

MOST_CODE = 2000
"""characters of a block of code that are coloured; more stays plain, for some lexers take quadratic time"""
LANGUAGES = {
    "bash", "c", "c++", "console", "cpp", "css", "diff", "go", "html", "java", "javascript", "js", "json", "kotlin",
    "latex", "lua", "make", "php", "python", "py", "r", "ruby", "rust", "sh",
    "shell", "sql", "swift", "tex", "toml", "ts", "typescript", "xml", "yaml",
}  # fmt: skip
"""that are coloured"""
MOST_FORMULA = 1000
"""characters of a formula that is drawn: nested 3,000 deep, math-core draws one; 10,000 deep, it overflows the stack"""
MOST_TEXT = 20_000
"""characters that are read as Markdown, in which some rules take quadratic time; longer texts stay plain"""
LIGHT_STYLE, DARK_STYLE = "xcode", "github-dark"
NEW_PAGE = {"target": "_blank", "rel": "noopener noreferrer nofollow"}


def to_html(text: str) -> str:
    """Markdown as HTML; a block that is not finished yet, such as code, ends with the text."""
    return _MARKDOWN.render(text) if len(text) <= MOST_TEXT else f"<pre>{html.escape(text)}</pre>"


def code_css() -> str:
    """The colours of code, in light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs("pre code") for style in (LIGHT_STYLE, DARK_STYLE))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\npre code {{ background: none }}\n"


def _highlight(code: str, language: str, attributes: str) -> str:
    if language.lower() not in LANGUAGES or len(code) > MOST_CODE:
        return ""  # markdown-it then escapes it
    try:
        return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True))
    except ClassNotFound:
        return ""


def _formula(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[at]
    try:
        if len(token.content) > MOST_FORMULA:
            raise LatexError
        return _MATH.convert_with_local_state(token.content, displaystyle="block" in token.type)
    except LatexError:  # the model's mistake, or not written to its end yet
        return f"<code>{html.escape(token.content)}</code>"


def _bracketed_formula(state: StateInline, silent: bool) -> bool:
    """LaTeX's own \\( \\) and \\[ \\], which models write as often as dollars."""
    opening = state.src[state.pos : state.pos + 2]
    if opening not in ("\\(", "\\["):
        return False
    end = state.src.find("\\)" if opening == "\\(" else "\\]", state.pos + 2, state.pos + MOST_FORMULA)
    if end < 0:
        return False
    if not silent:
        token = state.push("math_inline" if opening == "\\(" else "math_block", "math", 0)
        token.content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


def _link(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    tokens[at].attrs.update(NEW_PAGE)
    return self.renderToken(tokens, at, options, env)  # type: ignore[attr-defined]  # the protocol leaves it out


def _image(self: RendererProtocol, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[at]
    attributes = {"href": token.attrs["src"], **NEW_PAGE}
    opening = " ".join(f'{name}="{html.escape(str(value))}"' for name, value in attributes.items())
    return f"<a {opening}>{html.escape(token.content or str(token.attrs['src']))}</a>"


_MATH = LatexToMathML()
_MARKDOWN = dialect()
_MARKDOWN.options.update({"highlight": _highlight, "breaks": True})  # a model that begins a new line means it
_MARKDOWN.use(dollarmath_plugin, allow_space=False, allow_digits=False)  # "$5 and $10" are sums of money
_MARKDOWN.inline.ruler.before("escape", "bracketed_formula", _bracketed_formula)
for name in ("math_inline", "math_inline_double", "math_block", "math_block_label", "math_block_end"):
    _MARKDOWN.add_render_rule(name, _formula)
_MARKDOWN.add_render_rule("link_open", _link)
_MARKDOWN.add_render_rule("image", _image)
