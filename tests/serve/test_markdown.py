"""Markdown to HTML: rendering, and that untrusted text yields no markup, script or request to other hosts."""

from html.parser import HTMLParser

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat.serve.markdown import code_css, to_html

TAGS = """h1 h2 h3 h4 h5 h6 p br hr strong em s code pre span a ul ol li blockquote table thead tbody tr th td
    math mi mo mn ms mtext mrow mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mspace
    mpadded mphantom menclose mstyle merror mmultiscripts mprescripts none semantics"""
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt&colon;alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](vbscript:x)",
    "![a](http://evil.example/a.png)",
    '![a](http://e.x/"onerror="alert(1))',
    '[a](http://e.x "t\\" onmouseover=alert(1)")',
    "<http://e.x/<script>>",
    '```python"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "$\\text{<script>alert(1)</script>}$",
    "$$\\href{javascript:alert(1)}{x}$$",
    "\\(<img src=x onerror=alert(1)>\\)",
    "\\[\\begin{matrix}<b>&\\end{matrix}\\]",
    "$a$<script>$b$",
    "| a |\n|---|\n| <script>alert(1)</script> |",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]


class Markup(HTMLParser):
    """The tags and attributes of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(text: str) -> None:
    markup = Markup(to_html(text))
    assert markup.tags <= set(TAGS.split())
    for tag, name, value in markup.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "id", "formaction", "xlink:href")
        if name == "href":
            assert tag == "a" and value is not None
            scheme = value.partition(":")[0].lower().strip() if ":" in value.partition("/")[0] else ""
            assert scheme not in ("javascript", "vbscript", "data", "file")


@pytest.mark.parametrize("text", ATTACKS)
def test_attack_becomes_text(text: str) -> None:
    check_harmless(text)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.sampled_from([*ATTACKS, "\n", "`", "$", "*", "> ", "- ", "\\", "[", "](", "|", "~~"])))
def test_no_mixture_of_attacks_becomes_markup(pieces: list[str]) -> None:
    check_harmless("".join(pieces))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.text(alphabet="\\{}$()[]^_&<>\"' abfrcsqtlei012\n"))
def test_no_formula_breaks_it(text: str) -> None:
    check_harmless(f"${text}$")


@pytest.mark.parametrize("piece", ["{", "\\frac", "\\sqrt[", "\\left(", "^{", "\\begin{matrix}"])
@pytest.mark.parametrize("marks", [("$", "$"), ("\\(", "\\)"), ("$$\n", "\n$$")])
def test_formula_nested_without_end_is_text(piece: str, marks: tuple[str, str]) -> None:
    check_harmless(f"{marks[0]}{piece * (19_000 // len(piece))}{marks[1]}")
    check_harmless(f"{marks[0]}{piece * (990 // len(piece))}{marks[1]}")


def test_code_is_highlighted_and_escaped() -> None:
    html = to_html('```python\nprint("<b>")\n```')
    assert '<span class="nb">print</span>' in html and "&lt;b&gt;" in html
    assert Markup(to_html("```nonsense\n<b>\n```")).text == "<b>\n\n"


@pytest.mark.parametrize(("language", "length"), [("java", 6000), ("brainfuck", 100)])
def test_code_that_is_long_or_in_a_rare_language_stays_plain(language: str, length: int) -> None:
    assert "span" not in Markup(to_html(f"```{language}\n{'a ' * (length // 2)}\n```")).tags


def test_unfinished_block_is_rendered() -> None:
    assert Markup(to_html("text\n\n```python\nprint(")).tags >= {"p", "pre", "code"}


@pytest.mark.parametrize("text", ["$x^2$", "\\(x^2\\)", "$$x^2$$", "\\[x^2\\]", "a\n\n$$\nx^2\n$$"])
def test_formula_is_mathml(text: str) -> None:
    assert {"math", "msup"} <= Markup(to_html(text)).tags


@pytest.mark.parametrize("text", ["$5 and $10", "it costs $5.", "a $ b $ c"])
def test_money_is_no_formula(text: str) -> None:
    assert "math" not in Markup(to_html(text)).tags and Markup(to_html(text)).text.strip() == text


def test_signs_stay_signs_and_lines_stay_lines() -> None:
    assert to_html("2*3*4 = 24\nvector<int>") == "<p>2*3*4 = 24<br />\nvector&lt;int&gt;</p>\n"


def test_links_open_in_a_new_tab_and_images_are_links() -> None:
    for text in ("[a](https://a.example)", "![a](https://a.example)"):
        attributes = {name: value for _, name, value in Markup(to_html(text)).attributes}
        assert attributes == {"href": "https://a.example", "target": "_blank", "rel": "noopener noreferrer nofollow"}


def test_code_css_loads_nothing() -> None:
    assert "prefers-color-scheme: dark" in code_css() and "url(" not in code_css()
