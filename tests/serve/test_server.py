"""The server under load and on client disconnects."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from nanochat.inference.chat import ChatModel
from nanochat.serve import engine_process, http_server
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CARD, ScriptedChatModel
from tests.serve.serving import CHAT, Served, chunks, say, scripted, serving, streamed, until

Both = tuple[Served, ScriptedChatModel]


@pytest.fixture
def both(tokenizer: Tokenizer) -> Iterator[Both]:
    """Room for one reply, and for one that waits."""
    with scripted(tokenizer, slots=1, max_waiting=1) as both:
        yield both


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    with scripted(tokenizer) as (served, _):
        yield served.client


def test_replies_are_written_at_the_same_time(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=say("wait", stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(3):
            assert client.post(CHAT, json=say("hello")).status_code == 200


def test_requests_wait_their_turn_and_a_full_queue_refuses(both: Both) -> None:
    served, model = both
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(served.client.post, CHAT, json=say("wait"))
        until(lambda: served.pool.running)
        second = clients.submit(served.client.post, CHAT, json=say("hello"))
        until(lambda: served.pool.waiting)
        refused = served.client.post(CHAT, json=say("hello"))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        model.engine.go.set()
        assert first.result().json()["choices"][0]["message"]["content"] == "well done"
        assert second.result().json()["choices"][0]["message"]["content"] == "hello"


def test_health_answers_at_once_while_replies_are_written(both: Both) -> None:
    served, _ = both
    with served.client.stream("POST", CHAT, json=say("wait", stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        start = time.monotonic()
        health = served.client.get("/health").json()
        assert time.monotonic() - start < 1
        assert (health["status"], health["running"], health["waiting"]) == ("ok", 1, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_slot(both: Both, stream: bool) -> None:
    served, model = both

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.url) as leaver:
            request = asyncio.create_task(leaver.post(CHAT, json=say("wait", stream=stream)))
            await asyncio.to_thread(until, lambda: model.engine.busy)
            request.cancel()

    asyncio.run(leave())
    until(lambda: model.engine.cancelled)
    assert served.client.post(CHAT, json=say("hello")).status_code == 200
    assert served.pool.unfinished == 0


def test_disconnect_leaves_the_queue(both: Both) -> None:
    served, model = both

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.url) as leaver:
            waiting = asyncio.create_task(leaver.post(CHAT, json=say("never read")))
            await asyncio.to_thread(until, lambda: served.pool.waiting == 1)
            waiting.cancel()

    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(served.client.post, CHAT, json=say("wait"))
        until(lambda: served.pool.running)
        asyncio.run(leave())
        until(lambda: served.pool.waiting == 0)
        model.engine.go.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_server_that_stops_explains_it_to_its_clients(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    monkeypatch.setattr(http_server, "SHUTDOWN_SECONDS", 0.1)
    before = threading.active_count()
    with ThreadPoolExecutor(1) as clients:
        with scripted(tokenizer) as (served, _):
            reply = clients.submit(httpx.post, served.url + CHAT, json=say("wait", stream=stream))
            until(lambda: served.pool.running)
        assert reply.result().status_code == (200 if stream else 500)
    assert "the server is stopping" in reply.result().text
    assert not stream or reply.result().text.endswith("data: [DONE]\n\n")
    until(lambda: threading.active_count() == before)
    assert not caplog.records


def test_server_stops_although_a_client_does_not_read(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "SHUTDOWN_SECONDS", 0.1)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with scripted(tokenizer) as (served, _):
            client.connect(("127.0.0.1", urlsplit(served.url).port))
            body = json.dumps({"texts": ["&" * 20_100] * 45}).encode()  # a response of 4.5 MB
            head = f"POST /render HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
            client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            until(lambda: "/render" in served.client.get("/metrics").text)
    assert not caplog.records


def test_too_many_replies_are_a_bad_request(both: Both) -> None:
    served, _ = both
    refused = served.client.post("/v1/completions", json={"prompt": ["hello"] * 17, "n": 16})
    assert refused.status_code == 400 and "at most 256" in refused.json()["error"]["message"]


def test_idle_engine_with_another_model_helps_a_full_one(tokenizer: Tokenizer) -> None:
    other = ModelCard("base", "d4", 9, 100)
    models: list[ScriptedChatModel] = []

    def load(card: ModelCard) -> ChatModel:
        models.append(ScriptedChatModel(tokenizer, slots=1))
        return models[-1]

    with serving(load, tokenizer, cards=(CARD, other), engines=2) as served, ThreadPoolExecutor(2) as clients:
        until(lambda: all(engine.loaded for engine in served.pool.engines))
        assert served.client.post(CHAT, json=say("hello", model=other.id)).status_code == 200
        replies = [clients.submit(served.client.post, CHAT, json=say(f"wait {i}")) for i in range(2)]
        until(lambda: [len(engine.replies) for engine in served.pool.engines] == [1, 1])
        until(lambda: [engine.loaded for engine in served.pool.engines] == [CARD, CARD])
        for model in models:
            model.engine.go.set()
        assert all(reply.result().status_code == 200 for reply in replies)


def test_requests_go_to_the_least_busy_engine(tokenizer: Tokenizer) -> None:
    models: list[ScriptedChatModel] = []

    def load(card: ModelCard) -> ChatModel:
        models.append(ScriptedChatModel(tokenizer))
        return models[-1]

    with serving(load, tokenizer, engines=2) as served, ThreadPoolExecutor(6) as clients:
        until(lambda: len(models) == 2 and all(engine.loaded for engine in served.pool.engines))
        replies = [clients.submit(served.client.post, CHAT, json=say(f"wait {i}")) for i in range(6)]
        until(lambda: served.pool.running == 6)
        assert [len(engine.replies) for engine in served.pool.engines] == [3, 3]
        for model in models:
            model.engine.go.set()
        assert all(reply.result().json()["choices"][0]["message"]["content"] == "well done" for reply in replies)


def test_metrics_count_what_happened(both: Both) -> None:
    served, _ = both
    served.client.post(CHAT, json=say("good day"))
    served.client.post(CHAT, json={})
    served.client.get("/nowhere")
    text = served.client.get("/metrics").text
    assert 'nanochat_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'nanochat_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert 'path="other",status="404"' in text and "/nowhere" not in text
    assert "nanochat_time_to_first_token_seconds_count 1.0" in text
    assert "nanochat_requests_running 0.0" in text and "nanochat_reply_tokens_per_second_bucket" in text


def test_exception_in_a_route_is_logged_reported_and_counted(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable() -> list[ModelCard]:
        raise PermissionError("chatsft_checkpoints")

    origin = {"origin": "https://friend.example"}
    with scripted(tokenizer, allowed_origins=["https://friend.example"]) as (served, _):
        monkeypatch.setattr(served.pool.registry, "list_models", unreadable)
        failed = served.client.get("/v1/models", headers=origin)
        assert failed.status_code == 500
        reported = {"message": "internal server error", "type": "server_error", "param": None, "code": None}
        assert failed.json() == {"error": reported}
        assert failed.headers["x-content-type-options"] == "nosniff"
        assert failed.headers["access-control-allow-origin"] == "https://friend.example"
        assert served.client.post(CHAT, json=say("my secret", model="another")).status_code == 500
        text = served.client.get("/metrics").text
        assert 'nanochat_requests_total{path="/v1/models",status="500"} 1.0' in text
        assert 'nanochat_requests_total{path="/v1/chat/completions",status="500"} 1.0' in text
        assert served.client.post(CHAT, json=say("hello")).status_code == 200
    assert caplog.text.count("PermissionError: chatsft_checkpoints") == 2
    assert "GET /v1/models failed" in caplog.text and "secret" not in caplog.text


def test_unknown_page_and_wrong_method_have_openais_shape(client: httpx.Client) -> None:
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    wrong = client.get(CHAT)
    assert wrong.status_code == 405 and "error" in wrong.json()


def test_body_of_unannounced_length_is_limited_too(client: httpx.Client) -> None:
    pieces = (b" " * 100_000 for _ in range(20))
    assert client.post(CHAT, content=pieces, headers={"content-type": "application/json"}).status_code == 413


def test_slow_client_receives_everything(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=say("count to 40", stream=True)) as response:
        next(lines := response.iter_lines())
        time.sleep(0.3)
        rest = [json.loads(line[6:]) for line in lines if line and not line.endswith("[DONE]")]
    assert streamed(rest) == "".join(f"{i + 1} " for i in range(40))
    assert streamed(chunks(client, say("hello"))) == "hello"


def test_text_is_sent_at_intervals_but_first_and_last_at_once(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = "".join(f"{i + 1} " for i in range(40))
    monkeypatch.setattr(engine_process, "SEND_SECONDS", 60.0)
    messages = chunks(client, say("count to 40", stream=True))
    assert streamed(messages) == counted and len(messages) < 8
    monkeypatch.setattr(engine_process, "SEND_SECONDS", 0.0)
    messages = chunks(client, say("count to 40", stream=True))
    assert streamed(messages) == counted and len(messages) > 40
