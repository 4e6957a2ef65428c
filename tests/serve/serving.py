"""Runs a server on a real socket, with scripted or real engines."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from nanochat.serve import http_server
from nanochat.serve.app import create_app
from nanochat.serve.engine_process import EngineLoop, ModelLoader
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.pool import EnginePool, StartEngine
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CARD, ScriptedChatModel

CHAT = "/v1/chat/completions"
INTERNALS = re.compile(
    r"function-|<function|valid dictionary|constrained|decode error|Value error|Input should|pydantic"
)
"""Words of Python and pydantic that no message to a client may contain."""


def in_thread(connection: socket.socket, load: ModelLoader, gpu: int | None) -> threading.Thread:
    """The engine's loop where a test can follow it."""
    thread = threading.Thread(target=EngineLoop(connection, load).run, daemon=True)
    thread.start()
    return thread


@dataclass
class Served:
    """A server that is up."""

    client: httpx.Client
    pool: EnginePool
    url: str


@contextmanager
def serving(
    load: ModelLoader,
    tokenizer: Tokenizer,
    *,
    host: str = "127.0.0.1",
    other_hosts: Sequence[str] = (),
    cards: Sequence[ModelCard] = (CARD,),
    engines: int = 1,
    max_waiting: int = 64,
    start: StartEngine = in_thread,
    wait: bool = True,
    **options: Any,
) -> Iterator[Served]:
    listener = http_server.bind(host, 0)
    pool = EnginePool(
        ModelRegistry(cards[0], lambda: list(cards)),
        load,
        gpus=[None] * engines,
        max_waiting=max_waiting,
        start=start,
    )
    app = create_app(pool, tokenizer, allowed_hosts=http_server.allowed_hosts(listener, host, other_hosts), **options)
    server = http_server.Server(app, pool.stop)
    thread = threading.Thread(target=server.run_on, args=(listener,))
    thread.start()
    try:
        url = http_server.url(listener, host)
        with httpx.Client(base_url=url, timeout=60) as client:
            if wait:
                until(lambda: client.get("/health").status_code == 200)
            yield Served(client, pool, url)
    finally:
        server.stop()
        thread.join()


@contextmanager
def scripted(tokenizer: Tokenizer, slots: int = 16, **options: Any) -> Iterator[tuple[Served, ScriptedChatModel]]:
    """One scripted engine behind a server."""
    model = ScriptedChatModel(tokenizer, slots=slots)
    with serving(lambda card: model, tokenizer, **options) as served:
        yield served, model


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for what another thread or process is about to do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def say(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def chunks(client: httpx.Client, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    """The events of a streamed answer; [DONE], which ends them, is checked and left out."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def streamed(events: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
