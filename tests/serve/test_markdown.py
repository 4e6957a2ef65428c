"""Markdown to HTML: rendering, and that untrusted text yields no markup, script or request to other hosts."""

import asyncio
import time
from html.parser import HTMLParser

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat.serve import renderer as renderer_module
from nanochat.serve.markdown import code_css, to_html
from nanochat.serve.renderer import Renderer

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
    "[a](vscode://file/etc/passwd)",
    "[a](intent://x#Intent;scheme=http;end)",
    "<ms-settings:x> <tel:1> [a](file:///x) [a](//e.x) [a](/v1/models) [a](x:y) [a][b]\n\n[b]: ssh://e.x",
    "![a](vscode:x)",
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
    "| a |\n|:-:|\n| <script>alert(1)</script> |",
    '$\\color{red}x$ $\\begin{array}{r|l}a&b\\end{array}$ $\\text{<b style="color:red">}$',
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
        assert not name.startswith("on") and name not in (
            "style",
            "src",
            "srcset",
            "action",
            "id",
            "formaction",
            "xlink:href",
        )
        if name == "href":
            assert tag == "a" and value is not None
            assert value.partition(":")[0].lower() in ("http", "https", "mailto")


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


def test_formula_on_lines_of_its_own_may_look_like_other_markdown() -> None:
    for text in ("$$\na\n\n- b\n= c\n$$", "> \\[\n> a\n> - b\n> \\]\n> text"):
        tags = Markup(to_html(text)).tags
        assert "math" in tags and not tags & {"li", "ul", "h1"}


@pytest.mark.parametrize(
    "pattern", ["$$", "$$a\n", "\\(a", "\\[\n", "![", "[a](", "*a**", "> - ", "|-", "`a``", "~~a", "<a"]
)
def test_no_pattern_takes_quadratic_time(pattern: str) -> None:
    start = time.process_time()
    to_html(pattern * (20_000 // len(pattern)))
    assert time.process_time() - start < 2  # 0.5 s for images on a slow CPU


def test_text_that_takes_too_long_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    async def render() -> list[list[str]]:
        renderer = Renderer()
        try:
            first = await renderer.render(["*a*", "*" * 30_000])
            slow = renderer.render(["*b*", "![" * 9_000, "*c*"])
            monkeypatch.setattr(renderer_module, "CPU_SECONDS", 0.02)
            await renderer.close()
            return [first, *await asyncio.gather(slow, renderer.render(["*d*"]))]
        finally:
            await renderer.close()

    assert asyncio.run(render()) == [
        ["<p><em>a</em></p>\n", f"<pre>{'*' * 30_000}</pre>"],
        ["<p><em>b</em></p>\n", f"<pre>{'![' * 9_000}</pre>", "<pre>*c*</pre>"],
        ["<p><em>d</em></p>\n"],
    ]


def test_alignment_and_color_are_left_to_the_script() -> None:
    html = to_html("| a |\n|--:|\n| 1 |\n\n$\\color{red}x$")
    assert html.count('data-style="text-align:right"') == 2 and 'data-style="color:#FF0000;"' in html


def test_links_open_in_a_new_tab_and_images_are_links() -> None:
    for text in ("[a](https://a.example)", "![a](https://a.example)"):
        attributes = {name: value for _, name, value in Markup(to_html(text)).attributes}
        assert attributes == {"href": "https://a.example", "target": "_blank", "rel": "noopener noreferrer nofollow"}


def test_code_css_loads_nothing() -> None:
    assert "prefers-color-scheme: dark" in code_css() and "url(" not in code_css()
