"""Attacks on the server and the page: slow Markdown, idle connections, dying engines, stops, and hostile imports."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright

from benchmarks.attacks.files import new_process
from benchmarks.random_model import random_model
from benchmarks.server_load import process_tree
from nanochat.data import demo_data
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.runtime import Runtime
from nanochat.serve import http_server
from nanochat.serve.app import create_app
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.pool import EnginePool
from nanochat.tokenizer import Tokenizer

CARD = ModelCard("sft", "d1", 0, 256)
VOCAB_SIZE = 512
CHAT = "/v1/chat/completions"
MAX_SECONDS = 5.0  # for a request of somebody else
MARKDOWN_LENGTH = 19_990
MARKDOWN_PIECES = [
    "$", "$$", "\\", "\\(", "\\)", "\\[", "\\]", "`", "``", "```", "~~", "*", "**", "_", "[", "]", "](", "![", "<", ">",
    "> ", "- ", "1. ", "# ", "|", "|-|", "\n", "\n\n", "a", " ", "    ", "&", "&amp;", "http://a", '"', "(", ")", "{",
    "}", "^", "=", "---", "[a]: ", "\t", "<a", "<!--", "0", "\n$$", "\n|", "\n> ", "\n- ", "```java\n",
]  # fmt: skip
REQUEST_PARTS = [
    b"",
    b"GET /health HTT",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
]
SCRIPT = "document.title='attacked'"
PAYLOADS = [
    f"<script>{SCRIPT}</script>",
    f'<img src=x onerror="{SCRIPT}">',
    f"<svg onload={SCRIPT}>",
    f"[x](javascript:{SCRIPT})",
    f"[x](JaVaScRiPt&colon;{SCRIPT})",
    f"[x](data:text/html,<script>{SCRIPT}</script>)",
    "[x](vscode://file/x) [x](intent://x#Intent;end) <ms-settings:x> [x](ssh://x) [x](tel:1) [x](blob:x)",
    "![x](http://192.0.2.1/x.png)",
    f'![x](http://192.0.2.1/"onerror="{SCRIPT})',
    f'[x](http://192.0.2.1 "t\\" onmouseover={SCRIPT}")',
    f'```python"><script>{SCRIPT}</script>\nx\n```',
    f"$\\text{{<img src=x onerror={SCRIPT}>}}$",
    f"$$\\href{{javascript:{SCRIPT}}}{{x}}$$",
    f"| a |\n|--:|\n| <img src=x onerror={SCRIPT}> |",
    f'"><iframe srcdoc="<script>parent.{SCRIPT}</script>">',
    "<link rel=stylesheet href=http://192.0.2.1/x> <meta http-equiv=refresh content=0;url=http://192.0.2.1>",
    "<form action=http://192.0.2.1><button>x</button></form> <base href=http://192.0.2.1>",
    '<b data-style="background:url(http://192.0.2.1/x)">x</b> <span style="position:fixed">x</span>',
]


def load_model(card: ModelCard, folder: Path) -> ChatModel:
    """Wait until the file `hold` is removed, then build a small model with random weights."""
    while (folder / "hold").exists():
        time.sleep(0.01)
    model = random_model(1, VOCAB_SIZE, CARD.context, Runtime.start("cpu"))
    return ChatModel(card.source, Engine(model, tokenizer(), max_batch_size=4))


def tokenizer() -> Tokenizer:
    return Tokenizer.train(demo_data.documents("train")[:300], VOCAB_SIZE)


def serve(folder: Path, pipe: Connection, max_descriptors: int | None) -> None:
    """Run a server in a new process group, with stderr in the file `log`. Sends its port first."""
    os.setsid()
    os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), sys.stderr.fileno())
    if max_descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptors, max_descriptors))
    listener = http_server.bind("127.0.0.1", 0)
    pipe.send(listener.getsockname()[1])
    pool = EnginePool(ModelRegistry(CARD), functools.partial(load_model, folder=folder))
    http_server.Server(create_app(pool, tokenizer()), pool.stop).run_on(listener)


@dataclass
class Served:
    """A running server."""

    pid: int
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> str:
        """Return the status at /health, "" if it does not respond in time."""
        try:
            return str(httpx.get(f"{self.url}/health", timeout=MAX_SECONDS).json()["status"])
        except httpx.TransportError:
            return ""

    def engine(self) -> int:
        """Return the id of the engine process, 0 if there is none."""
        with contextlib.suppress(OSError):
            for pid in process_tree(self.pid)[1:]:
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return 0


@contextlib.contextmanager
def serving(folder: Path, max_descriptors: int | None = None, wait: bool = True) -> Iterator[Served]:
    ours, theirs = multiprocessing.Pipe()
    server = new_process(serve, folder, theirs, max_descriptors)
    server.start()
    assert server.pid
    served = Served(server.pid, ours.recv(), folder / "log")
    try:
        assert not wait or until(lambda: served.health() == "ok", 300), served.log.read_text()
        yield served
    finally:
        server.terminate()
        server.join()


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Return True once the condition holds, False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def render(folder: Path, texts: int = 100, seed: int = 0) -> Iterator[tuple[str, bool]]:
    """Send Markdown made of repeated patterns to /render. Succeeds if somebody else's text or /health has to wait."""
    rng = random.Random(seed)
    patterns = [*MARKDOWN_PIECES, *("".join(rng.sample(MARKDOWN_PIECES, rng.randint(2, 5))) for _ in range(texts))]
    with serving(folder) as served, ThreadPoolExecutor(1) as others:
        for pattern in patterns[:texts]:
            text = (pattern * MARKDOWN_LENGTH)[:MARKDOWN_LENGTH]
            attack = others.submit(httpx.post, f"{served.url}/render", json={"texts": [text] * 3}, timeout=60)
            start = time.monotonic()
            html = httpx.post(f"{served.url}/render", json={"texts": ["*a*"]}, timeout=60).json()["html"]
            served_others = html == ["<p><em>a</em></p>\n"] and served.health() == "ok"
            delay = time.monotonic() - start
            yield f"{pattern!r} delays others by {delay:.1f} s", not served_others or delay > MAX_SECONDS
            attack.result()


def connections(folder: Path) -> Iterator[tuple[str, bool]]:
    """Open idle connections of four kinds. Succeeds if others are not served, or the log has many lines."""
    raise_own_limit()
    for max_descriptors, count in ((None, 1500), (40, 80)):
        with serving(folder, max_descriptors) as served:
            for part in REQUEST_PARTS:
                with contextlib.ExitStack() as stack:
                    for _ in range(count):
                        with contextlib.suppress(OSError):
                            idle = stack.enter_context(
                                socket.create_connection(("127.0.0.1", served.port), timeout=0.2)
                            )
                            idle.sendall(part)
                    reached = sum(served.health() == "ok" for _ in range(5))
                lines = len(served.log.read_text().splitlines())
                name = f"{count} x {part[:20]!r}, {max_descriptors} descriptors: {reached} of 5 served, {lines} lines"
                yield name, reached < 5 or lines > 5


def raise_own_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))


def engines(folder: Path, kills: int = 3) -> Iterator[tuple[str, bool]]:
    """Kill the engine while it loads and while it replies, and stop it. Succeeds if it is not replaced and reported."""
    (folder / "hold").touch()
    with serving(folder, wait=False) as served:
        for number in range(kills):
            until(served.engine, 30)
            pid = served.engine()
            os.kill(pid, signal.SIGKILL)
            reported = until(lambda: served.health() == "failed", 5)
            replaced = until(lambda: served.engine() not in (0, pid), 180)  # noqa: B023  # called before the next pid
            yield f"kill {number} while loading", not (reported and replaced)
        (folder / "hold").unlink()
        yield "never loaded", not until(lambda: served.health() == "ok", 180)
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            os.kill(served.engine(), number)
            body = {"prompt": [[1] * 200] * 16, "n": 4, "max_tokens": 1}
            start = time.monotonic()
            with ThreadPoolExecutor(4) as clients:
                floods = [
                    clients.submit(httpx.post, f"{served.url}/v1/completions", json=body, timeout=90) for _ in "1234"
                ]
                reported = until(lambda: served.health() not in ("ok", ""), 20)
                answered = all(flood.result().status_code in (429, 500, 503) for flood in floods)
            delay = time.monotonic() - start
            replaced = until(lambda: served.health() == "ok", 180)
            yield (
                f"{name} of an idle engine: {reported=}, {answered=}, {replaced=}, {delay:.0f} s",
                not (reported and answered and replaced),
            )


def stops(folder: Path, tries: int = 4) -> Iterator[tuple[str, bool]]:
    """Send SIGTERM in the middle of a stream. Succeeds if anything is logged or the client gets no error."""
    for number in range(tries):
        with serving(folder) as served:
            body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 200, "n": 16}
            with httpx.stream("POST", served.url + CHAT, json=body, timeout=60) as response:
                lines = response.iter_lines()
                received = [next(lines) for _ in range(20)]
                (os.kill if number % 2 else os.killpg)(served.pid, signal.SIGTERM)
                with contextlib.suppress(httpx.TransportError):
                    received += lines
            ended = [line for line in received if line][-1] == "data: [DONE]"
            until(lambda: not Path(f"/proc/{served.pid}/exe").exists(), 30)
            log = served.log.read_text()
        yield f"stop {number}: {ended=}, log {log!r}", not ended or bool(log)


def page(folder: Path) -> Iterator[tuple[str, bool]]:
    """Import hostile conversations into the page. Succeeds if a script runs, a request leaves, or a link is unsafe."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("page: skipped, because it needs chromium", file=sys.stderr)
        return
    with serving(folder) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for payload in PAYLOADS:
            context = browser.new_context()
            shown = context.new_page()
            requests: list[str] = []
            shown.on("request", lambda request: requests.append(request.url))  # noqa: B023  # of this page
            shown.goto(served.url)
            contents: list[Any] = [
                payload,
                *([{"type": kind, "text": payload}] for kind in ("text", "python", "python_output")),
            ]
            messages: list[dict[str, Any]] = [{"role": "user", "content": payload}]
            messages += [{"role": "assistant", "content": content, "stats": {"model": payload}} for content in contents]
            conversation = {"id": payload, "title": payload, "updated": 1, "messages": messages}
            export = folder / "export.json"
            export.write_text(json.dumps({"nanochat": 1, "conversations": [conversation]}))
            shown.get_by_label("File to import").set_input_files(export)
            shown.locator("#conversations .name").first.click()
            shown.locator(".turn .tools").nth(len(contents)).wait_for()
            shown.wait_for_timeout(300)
            links = shown.locator("#messages a").evaluate_all("(links) => links.map((link) => link.href)")
            title = shown.title()
            context.close()
            elsewhere = [url for url in requests if not url.startswith(served.url)]
            unsafe = [link for link in links if not re.match("https?:|mailto:", link)]
            yield (
                f"{payload}: title {title}, requests {elsewhere}, links {unsafe}",
                bool(title != "nanochat" or elsewhere or unsafe),
            )
        browser.close()


def fuzz(folder: Path, requests: int = 2_000) -> Iterator[tuple[str, bool]]:
    """Send generated requests to all routes. Succeeds if one is answered with a status of 500 or above."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-o", "timeout=0", "tests/serve/test_schema.py"]
    result = subprocess.run(
        command, env={**os.environ, "SCHEMATHESIS_REQUESTS": str(requests)}, capture_output=True, text=True
    )
    for number in range(requests):
        yield result.stdout if number == 0 else "", number == 0 and result.returncode != 0
