"""The chat page in a real browser: Debian's and Ubuntu's chromium, driven by playwright."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, expect, sync_playwright

from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CARD, CONTEXT, ScriptedChatModel
from tests.serve.serving import Served, scripted, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
BASE = ModelCard("base", "d4", 9, CONTEXT)
SECONDS = 30  # that a busy machine may take
PHONE = {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: sudo apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        expect.set_options(timeout=SECONDS * 1000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def both(tokenizer: Tokenizer) -> Iterator[tuple[Served, ScriptedChatModel]]:
    with scripted(tokenizer, cards=(CARD, BASE)) as both:
        yield both


@pytest.fixture
def page(browser: Browser, both: tuple[Served, ScriptedChatModel]) -> Iterator[Page]:
    """The page as a newcomer finds it. It may talk to no other host, and nothing may go wrong in its script."""
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(both[0].url)
    expect(page.get_by_label("Model and training stage")).to_have_value(CARD.id)
    yield page
    both[1].engine.go.set()
    context.close()
    both[1].engine.go.clear()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith("blob:")}
    assert hosts == {urlsplit(both[0].url).netloc}
    assert not wrong


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def replies(page: Page) -> Locator:
    return page.get_by_role("article", name="Reply")


def is_kept(page: Page, text: str) -> bool:
    """True if localStorage has the text. (wait_for_function needs eval, which the page's CSP forbids.)"""
    found = page.evaluate("(text) => Object.values(localStorage).some((value) => value.includes(text))", text)
    return bool(found)


def test_a_message_is_answered_and_the_speed_is_shown(page: Page) -> None:
    send(page, "good day to you")
    expect(page.get_by_role("article", name="You")).to_contain_text("good day to you")
    expect(replies(page).locator(".text")).to_have_text("good day to you")
    expect(replies(page).locator(".stats")).to_have_text(re.compile(r"\d+ tokens, [\d.]+ tokens/s"))


def test_shift_enter_inserts_a_line_break_and_a_suggestion_can_be_clicked(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message", exact=True)).to_have_value("one\ntwo")
    page.get_by_role("button", name="Who are you?").click()
    expect(replies(page).locator(".text")).to_have_text("Who are you?")


def test_reply_appears_while_it_is_written_and_esc_stops_it(page: Page, both: tuple[Served, ScriptedChatModel]) -> None:
    stopped = len(both[1].engine.cancelled)
    send(page, "wait")
    expect(replies(page).locator(".text")).to_have_text("well")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(replies(page)).to_contain_text("Stopped.")
    until(lambda: len(both[1].engine.cancelled) == stopped + 1)
    send(page, "hello")
    expect(replies(page).last.locator(".text")).to_have_text("hello")


def test_message_is_edited_and_sent_again(page: Page) -> None:
    for text in ("one", "two"):
        send(page, text)
        expect(replies(page).last.locator(".stats")).to_be_visible()
    first = page.get_by_role("article", name="You").first
    first.hover()
    first.get_by_label("Edit").click()
    page.get_by_label("Edit message").fill("three")
    page.keyboard.press("Enter")
    expect(replies(page).locator(".text")).to_have_text(["three"])
    expect(page.get_by_role("article", name="You")).to_have_count(1)


def test_reply_is_regenerated(page: Page, both: tuple[Served, ScriptedChatModel]) -> None:
    send(page, "hello")
    replies(page).get_by_label("Regenerate").click()
    expect(replies(page).locator(".stats")).to_be_visible()
    first, second = both[1].engine.samplings[-2:]
    assert both[1].engine.prompts[-1] == both[1].engine.prompts[-2] and first.seed != second.seed
    expect(replies(page).locator(".text")).to_have_text(["hello"])


def test_reply_is_restored_if_regenerating_fails(page: Page, both: tuple[Served, ScriptedChatModel]) -> None:
    send(page, "hello")
    expect(replies(page).locator(".stats")).to_be_visible()
    page.evaluate("() => { window.fetch = async () => { throw new TypeError('gone'); }; }")
    replies(page).get_by_label("Regenerate").click()
    expect(replies(page)).to_contain_text("Cannot reach the server.")
    expect(replies(page)).to_contain_text("hello")
    page.reload()
    expect(replies(page).locator(".text")).to_have_text(["hello"])


def test_complete_reply_is_saved_before_it_is_rendered(page: Page) -> None:
    page.route("**/render", lambda route: None)  # never answered
    send(page, "good day")
    expect(replies(page)).to_have_count(1)
    until(lambda: is_kept(page, '"speed"'))
    page.unroute("**/render")
    page.reload()
    expect(replies(page).locator(".text")).to_have_text(["good day"])
    expect(replies(page).locator(".stats")).to_be_visible()


def test_conversation_that_is_deleted_while_it_is_answered_stays_deleted(page: Page) -> None:
    send(page, "wait")
    expect(replies(page).locator(".text")).to_have_text("well")
    page.once("dialog", lambda dialog: dialog.accept())
    rows = page.get_by_label("Conversations").get_by_role("listitem")
    rows.first.hover()
    page.get_by_label("Delete wait").click()
    expect(rows).to_have_text(["Conversations are stored in this browser"])
    page.reload()
    expect(rows).to_have_text(["Conversations are stored in this browser"])


def test_conversation_is_there_after_a_reload(page: Page) -> None:
    send(page, "calculate")
    expect(replies(page).locator(".stats")).to_be_visible()
    page.reload()
    expect(replies(page).locator(".text")).to_have_text(["Let me see.", "It is 1665."])
    expect(replies(page).locator(".step .result")).to_have_text("1665")
    expect(replies(page).locator(".stats")).to_be_visible()


def test_what_was_written_before_a_reload_is_kept(page: Page) -> None:
    send(page, "wait")
    expect(replies(page).locator(".text")).to_have_text("well")
    page.reload()
    expect(replies(page).locator(".text")).to_have_text("well")
    expect(replies(page)).to_contain_text("Stopped.")


def test_what_was_written_before_the_browser_crashed_is_kept(
    page: Page, both: tuple[Served, ScriptedChatModel]
) -> None:
    send(page, "wait")
    until(lambda: is_kept(page, '"well"'))
    with pytest.raises(Error):  # there is no event for it
        page.goto("chrome://crash")
    again = page.context.new_page()
    again.goto(both[0].url)
    expect(replies(again).locator(".text")).to_have_text("well")
    expect(replies(again)).to_contain_text("Stopped.")
    both[1].engine.go.set()
    replies(again).get_by_label("Regenerate").click()
    expect(replies(again).locator(".text")).to_have_text("well done")
    again.reload()
    expect(replies(again).locator(".stats")).to_be_visible()
    expect(replies(again)).not_to_contain_text("Stopped.")


def test_back_navigation_shows_the_stopped_reply(page: Page) -> None:
    send(page, "wait")
    expect(replies(page).locator(".text")).to_have_text("well")
    for name in ("pagehide", "pageshow"):  # as when the browser keeps a page that is left, and brings it back
        page.evaluate(f"dispatchEvent(new PageTransitionEvent('{name}', {{persisted: true}}))")
    expect(replies(page).locator(".text")).to_have_text("well")
    expect(replies(page)).to_contain_text("Stopped.")
    expect(replies(page).get_by_label("Regenerate")).to_be_visible()


def test_name_can_be_typed_while_a_reply_is_written(page: Page) -> None:
    send(page, "wait")
    rows = page.get_by_label("Conversations").get_by_role("listitem")
    rows.first.hover()
    rows.get_by_label("Rename wait").click()
    page.keyboard.type("pati")
    until(lambda: is_kept(page, '"well"'))
    page.keyboard.type("ence")
    page.keyboard.press("Enter")
    expect(rows).to_have_text(["patience"])


def test_tool_call_is_a_step_with_code_and_result(page: Page) -> None:
    send(page, "calculate")
    step = replies(page).locator(".step")
    expect(step.get_by_label("Code")).to_have_text("37*45")
    expect(step.get_by_label("Result")).to_have_text("1665")
    step.get_by_text("Ran Python").click()
    expect(step.get_by_label("Code")).to_be_hidden()


def test_markdown_is_rendered_and_html_is_escaped(page: Page) -> None:
    send(page, "markdown")
    reply = replies(page)
    expect(reply.locator(".stats")).to_be_visible()
    expect(reply.locator("strong")).to_have_text("bold")
    expect(reply.locator("math msup")).to_be_visible()
    expect(reply.locator("pre code .nb")).to_have_text("print")
    expect(reply).to_contain_text("<img src=x onerror=alert(1)>")
    assert reply.locator("img").count() == 0
    expect(reply.get_by_label("Copy code")).to_be_visible()


def test_copy_puts_the_text_on_the_clipboard(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    send(page, "markdown")
    expect(replies(page).locator(".stats")).to_be_visible()
    replies(page).get_by_label("Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("Some **bold** and $x^2$")
    replies(page).get_by_label("Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)\n"


def test_conversations_are_found_renamed_and_deleted(page: Page) -> None:
    rows = page.get_by_label("Conversations").get_by_role("listitem")
    for text in ("apples", "pears"):
        page.get_by_label("New chat").click()
        send(page, text)
        expect(replies(page).locator(".stats")).to_be_visible()
    expect(rows).to_have_text(["pears", "apples"])
    page.get_by_label("Search conversations").fill("apple")
    expect(rows).to_have_text(["apples"])
    rows.first.hover()
    rows.get_by_label("Rename apples").click()
    page.keyboard.type("fruit")
    page.keyboard.press("Enter")
    expect(rows).to_have_text(["fruit"])  # it is found by what was said in it
    page.get_by_label("Search conversations").fill("")
    page.once("dialog", lambda dialog: dialog.accept())
    rows.first.hover()
    page.get_by_label("Delete pears").click()
    expect(rows).to_have_text(["fruit"])
    expect(replies(page)).to_have_count(0)
    rows.get_by_role("button", name="fruit", exact=True).click()
    expect(replies(page).locator(".text")).to_have_text("apples")


def test_conversations_are_exported_and_imported(page: Page, tmp_path: Path) -> None:
    send(page, "calculate")
    expect(replies(page).locator(".stats")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    (kept,) = json.loads(path.read_text())["conversations"]
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    page.evaluate("localStorage.clear()")
    page.reload()
    rows = page.get_by_label("Conversations").get_by_role("listitem")
    expect(rows).to_have_text(["Conversations are stored in this browser"])
    page.get_by_label("File to import").set_input_files(path)
    rows.get_by_role("button", name="calculate", exact=True).click()
    expect(replies(page).locator(".text").last).to_have_text("It is 1665.")
    path.write_text('{"nanochat": 1, "conversations": [{"id": 1}]}')
    page.once("dialog", lambda dialog: dialog.accept())
    with page.expect_event("dialog") as dialog:
        page.get_by_label("File to import").set_input_files(path)
    assert "Cannot import" in dialog.value.message


def test_settings_go_with_the_next_message_and_stay(page: Page, both: tuple[Served, ScriptedChatModel]) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("be brief")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("11")
    page.get_by_role("button", name="Done").click()
    page.reload()
    send(page, "hello")
    expect(replies(page).locator(".stats")).to_be_visible()
    engine = both[1].engine
    assert (engine.samplings[-1].temperature, engine.samplings[-1].seed) == (0.25, 11)
    assert "be brief" in engine.tokenizer.decode(engine.prompts[-1])


FOREIGN: list[dict[str, Any]] = [
    {"content": "a *plain* string"},
    {"content": [{"type": "text", "text": "a *plain* string", "extra": {}}], "stats": {"speed": "fast", "tokens": 3}},
    {"content": "a *plain* string", "stats": [1], "stopped": "no", "extra": [[]]},
    {"content": "a *plain* string", "stats": {"model": {}, "wait": "x", "tokens": 1e400}},
]


@pytest.mark.parametrize("reply", FOREIGN)
def test_conversation_of_another_program_is_shown(page: Page, tmp_path: Path, reply: dict[str, Any]) -> None:
    path = tmp_path / "export.json"
    messages = [{"role": "user", "content": "hello", "name": "x"}, {"role": "assistant", **reply}]
    conversation = {"id": "__proto__", "title": "<b>imported</b>", "updated": 1, "messages": messages}
    path.write_text(json.dumps({"nanochat": 1, "conversations": [conversation]}).replace("Infinity", "1e400"))
    page.get_by_label("File to import").set_input_files(path)
    page.get_by_role("button", name="<b>imported</b>", exact=True).click()
    expect(replies(page).locator("em")).to_have_text("plain")
    send(page, "hello")
    expect(replies(page).locator(".text").last).to_have_text("hello")
    page.reload()
    expect(replies(page).locator("em")).to_have_text("plain")


def test_alignment_and_color_pass_the_content_security_policy(page: Page) -> None:
    send(page, "| a |\n|--:|\n| 1 |\n\n$\\color{red}x$ [a](vscode://file/x)")
    expect(replies(page).get_by_role("cell", name="1")).to_have_css("text-align", "right")
    expect(replies(page).locator("mi, mstyle").first).to_have_css("color", "rgb(255, 0, 0)")
    expect(replies(page).locator("a")).to_have_count(0)


def test_switching_models(page: Page, both: tuple[Served, ScriptedChatModel]) -> None:
    page.get_by_label("Model and training stage").select_option("base d4 step 9")
    send(page, "hello")
    expect(replies(page).locator(".stats")).to_be_visible()
    assert both[0].pool.engines[0].loaded == BASE
    page.reload()
    expect(page.get_by_label("Model and training stage")).to_have_value(BASE.id)


def test_phone_has_the_conversations_in_a_drawer_and_nothing_sticks_out(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]  # a dict of this shape
    send(page, "markdown")
    expect(replies(page).locator(".stats")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    box = replies(page).bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    expect(page.get_by_label("Search conversations")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_label("Search conversations")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Search conversations")).to_be_hidden()


def test_every_control_has_a_name(page: Page) -> None:
    send(page, "markdown")
    expect(replies(page).locator(".stats")).to_be_visible()
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")].filter((node) =>
            !node.getAttribute("aria-label") && !node.textContent.trim() && !node.labels?.length).length"""
    )
    assert nameless == 0


def test_error_is_shown_and_the_next_message_works(page: Page) -> None:
    send(page, "fail")
    expect(replies(page)).to_contain_text("the model failed")
    send(page, "hello")
    expect(replies(page).locator(".text")).to_have_text(["hello"])


def test_the_key_is_asked_for_and_kept(browser: Browser, tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, api_key="secret") as (served, _), browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url)
        for key in ("wrong", "secret"):
            page.get_by_role("textbox", name="API key").fill(key)
            page.get_by_role("button", name="Continue").click()
        expect(page.get_by_label("Model and training stage")).to_have_value(CARD.id)
        page.reload()
        send(page, "hello")
        expect(replies(page).locator(".text")).to_have_text("hello")


def test_text_runs_in_its_own_direction(page: Page) -> None:
    directions = "node => [...node.querySelectorAll('p, li, pre')].map(part => getComputedStyle(part).direction)"
    text = "مرحبا بالعالم (abc) ١٢٣.\n\n- שלום\n\n```\nx = 1\n```\n\n你好,世界。日本語の文章。"
    send(page, text)
    reply = replies(page).first
    expect(reply.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(reply.locator(".text")).to_have_css("direction", "rtl")
    assert reply.evaluate(directions) == ["rtl", "rtl", "ltr", "rtl"]
    expect(page.locator(".bubble").last).to_have_css("direction", "rtl")
    expect(reply.locator("p").last).to_contain_text("你好,世界。日本語の文章。")
    send(page, "Hello")
    expect(replies(page).nth(1).locator(".text")).to_have_css("direction", "ltr")


class PrefixProxy(BaseHTTPRequestHandler):
    """A reverse proxy that serves `target` under /chat/ and passes on the client's headers."""

    target: str

    def forward(self) -> None:
        if not self.path.startswith("/chat/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        url = self.target + self.path.removeprefix("/chat")
        with httpx.stream(self.command, url, headers=list(self.headers.items()), content=body, timeout=60) as response:
            self.send_response(response.status_code)
            for name, value in response.headers.items():
                if name not in ("content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            for piece in response.iter_raw():
                self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    do_GET = do_POST = forward  # noqa: N815


def test_the_page_works_behind_a_proxy_under_a_prefix_and_another_name(browser: Browser, tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, other_hosts=["spark.localhost"]) as (served, _):
        handler = type("Handler", (PrefixProxy,), {"target": served.url})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            threading.Thread(target=proxy.serve_forever).start()
            page = browser.new_page()
            page.set_default_timeout(SECONDS * 1000)
            page.goto(f"http://spark.localhost:{proxy.server_port}/chat/")
            expect(page.get_by_label("Model and training stage")).to_have_value(CARD.id)
            send(page, "markdown")
            expect(replies(page)).to_contain_text("Some bold")
            expect(replies(page).locator("strong")).to_have_text("bold")
            page.close()
            proxy.shutdown()
