"""The server under load, while loading, on client disconnects, and with unauthorized requests."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.serve import engine_process, http_server, pool
from nanochat.serve.engine_process import ModelLoader
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CARD, ScriptedChatModel
from tests.serve.serving import CHAT, Served, chunks, in_thread, say, scripted, serving, streamed, until

Both = tuple[Served, ScriptedChatModel]
DEAD = threading.Thread(target=int)
DEAD.start()


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


def test_requests_are_rejected_while_the_model_loads(tokenizer: Tokenizer) -> None:
    go = threading.Event()

    def load(card: ModelCard) -> ChatModel:
        go.wait(20)
        return ScriptedChatModel(tokenizer)

    with serving(load, tokenizer, wait=False) as served:
        health = served.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        refused = served.client.post(CHAT, json=say("hello"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        assert "retry-after" in refused.headers
        go.set()
        until(lambda: served.client.get("/health").status_code == 200)
        assert served.client.get("/health").json()["model"] == CARD.id
        assert served.client.post(CHAT, json=say("hello")).status_code == 200


def test_failure_to_load_the_model_is_reported(tokenizer: Tokenizer) -> None:
    def load(card: ModelCard) -> ChatModel:
        raise UserError("this model is damaged: train it again")

    reported: list[UserError | None] = []
    with serving(load, tokenizer, wait=False, on_loaded=reported.append):
        until(lambda: reported)
    assert "damaged" in str(reported[0])


def test_engine_that_dies_while_it_loads_is_restarted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After growing pauses, and /health reports the failure until a model is loaded."""
    pauses = (0.01, 0.02, 0.5)
    monkeypatch.setattr(pool, "RESTART_PAUSES", pauses)
    starts: list[float] = []

    def start(connection: socket.socket, load: ModelLoader, gpu: int | None) -> threading.Thread:
        starts.append(time.monotonic())
        if len(starts) <= len(pauses):
            connection.close()
            return DEAD
        return in_thread(connection, load, gpu)

    reported: list[UserError | None] = []
    with serving(
        lambda card: ScriptedChatModel(tokenizer), tokenizer, start=start, wait=False, on_loaded=reported.append
    ) as served:
        until(lambda: len(starts) == len(pauses))
        health = served.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        refused = served.client.post(CHAT, json=say("hello"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "failed"
        until(lambda: served.client.get("/health").status_code == 200)
        assert served.client.post(CHAT, json=say("hello")).status_code == 200
    assert reported == [None]
    assert all(b - a >= pause for a, b, pause in zip(starts, starts[1:], pauses, strict=False))


def test_model_that_kills_the_engine_is_replaced_by_the_last_good_one(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "RESTART_PAUSES", (0.01,))
    deadly = ModelCard("base", "d4", 9, 100)

    def load(card: ModelCard) -> ChatModel:
        if card == deadly:
            raise torch.AcceleratorError("out of memory")  # the process ends
        return ScriptedChatModel(tokenizer)

    with serving(load, tokenizer, cards=(CARD, deadly)) as served:
        assert served.client.post(CHAT, json=say("hello", model=deadly.id)).status_code == 500
        until(lambda: served.client.get("/health").status_code == 200)
        assert served.client.get("/health").json()["model"] == CARD.id
        assert served.client.post(CHAT, json=say("hello")).status_code == 200


def test_engine_that_stops_responding_is_replaced(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket fills up, which must not block the server."""
    monkeypatch.setattr(pool, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(pool, "STALLED_SECONDS", 1.0)
    monkeypatch.setattr(pool, "MAX_SILENT_SECONDS", 2.0)
    monkeypatch.setattr(pool, "RESTART_PAUSES", (0.01,))
    monkeypatch.setattr(engine_process, "HEARTBEAT_SECONDS", 0.02)
    frozen: list[socket.socket] = []

    def start(connection: socket.socket, load: ModelLoader, gpu: int | None) -> threading.Thread:
        if frozen:
            return in_thread(connection, load, gpu)
        frozen.append(connection)
        loaded = engine_process.ModelLoaded(CARD, 16, None)
        connection.sendall(engine_process.pack(loaded) + engine_process.pack(loaded)[:9])  # stops in a message
        return DEAD

    with (
        serving(lambda card: ScriptedChatModel(tokenizer), tokenizer, start=start, max_waiting=1000) as served,
        ThreadPoolExecutor(1) as clients,
    ):
        body = {"prompt": [[1] * 500] * 16, "n": 16, "max_tokens": 1}
        reply = clients.submit(served.client.post, "/v1/completions", json=body)
        until(lambda: served.pool.unfinished)
        statuses = set()
        while not reply.done():
            start_time = time.monotonic()
            statuses.add(served.client.get("/health").json()["status"])
            assert time.monotonic() - start_time < 1
        assert reply.result().status_code == 500 and "stalled" in statuses
        until(lambda: served.client.get("/health").status_code == 200)
        assert served.client.post(CHAT, json=say("hello")).status_code == 200


def test_engine_is_restarted_after_a_gpu_failure(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RESTART_PAUSES", (0.01,))
    model, go = ScriptedChatModel(tokenizer), threading.Event()
    loads: list[ModelCard] = []

    def load(card: ModelCard) -> ChatModel:
        loads.append(card)
        if len(loads) > 1:
            go.wait(20)
        return model

    def broken() -> None:
        vars(model.engine).pop("step")
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with serving(load, tokenizer) as served:
        model.engine.step = broken  # type: ignore[method-assign]
        assert served.client.post(CHAT, json=say("hello")).status_code == 500
        refused = served.client.post(CHAT, json=say("hello"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        go.set()
        until(lambda: served.client.get("/health").status_code == 200)
        assert served.client.post(CHAT, json=say("hello")).status_code == 200


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


def test_model_that_cannot_be_loaded_fails_only_its_own_requests(tokenizer: Tokenizer) -> None:
    damaged = ModelCard("base", "d4", 9, 100)

    def load(card: ModelCard) -> ChatModel:
        if card == damaged:
            raise UserError("this model is damaged: train it again")
        return ScriptedChatModel(tokenizer)

    with serving(load, tokenizer, cards=(CARD, damaged)) as served:
        refused = served.client.post(CHAT, json=say("hello", model=damaged.id))
        assert refused.status_code == 500 and "damaged" in refused.json()["error"]["message"]
        assert served.client.post(CHAT, json=say("hello")).status_code == 200
        assert served.client.get("/health").json()["model"] == CARD.id


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


def test_page_and_static_files_load_nothing_from_other_hosts(client: httpx.Client) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/static/chat.css", "/static/chat.js", "/static/icon.svg", "/code.css"):
        response = client.get(path)
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        assert (
            "https://" not in response.text and "//" not in response.text.replace("http://www.w3.org/2000/svg", "")[:0]
        )


def test_unknown_page_and_wrong_method_have_openais_shape(client: httpx.Client) -> None:
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    wrong = client.get(CHAT)
    assert wrong.status_code == 405 and "error" in wrong.json()


def test_body_of_unannounced_length_is_limited_too(client: httpx.Client) -> None:
    pieces = (b" " * 100_000 for _ in range(20))
    assert client.post(CHAT, content=pieces, headers={"content-type": "application/json"}).status_code == 413


def test_pages_of_other_sites_get_nothing(client: httpx.Client) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "http://evil.example"}).headers
    # A form or a simple fetch of another site may send text/plain without asking; it must not reach the model.
    headers = {"content-type": "text/plain", "origin": "http://evil.example"}
    plain = client.post(CHAT, content=json.dumps(say("hello")), headers=headers)
    assert plain.status_code == 400


def test_pages_that_were_allowed_may_use_the_api(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, allowed_origins=["https://friend.example"], api_key="secret") as (served, _):
        # as OpenAI's client for browsers asks
        names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        asked = {"access-control-request-method": "POST", "access-control-request-headers": names}
        friend = served.client.options(CHAT, headers={"origin": "https://friend.example", **asked})
        assert friend.status_code == 200 and "x-stainless-lang" in friend.headers["access-control-allow-headers"]
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        assert "access-control-allow-credentials" not in friend.headers
        other = served.client.options(CHAT, headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in other.headers


def test_api_key_is_asked_for_everywhere_but_at_the_page(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, api_key="sëcret") as (served, _):
        for path in ("/", "/static/chat.js", "/code.css", "/health"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/models", "/models", "/metrics", "/openapi.json", "/nowhere", "/static/../metrics"):
            assert served.client.get(path).status_code == 401
        for path in (CHAT, "/v1/completions", "/tokenize", "/render"):
            refused = served.client.post(path, json={})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        key = {b"authorization": "Bearer sëcret".encode()}
        assert 'path="other",status="401"' in served.client.get("/metrics", headers=key).text
        wrong: dict[str, Any] = {"headers": {"authorization": "Bearer secre"}}
        assert served.client.get("/v1/models", **wrong).status_code == 401
        right = {b"authorization": "Bearer sëcret".encode()}
        assert served.client.post(CHAT, json=say("hello"), headers=right).status_code == 200
    with scripted(tokenizer, api_key="secret") as (served, _):
        for name, value, status in (
            ("authorization", "bearer secret", 200),
            ("x-api-key", "secret", 200),
            ("x-api-key", "secre", 401),
            ("authorization", "Basic secret", 401),
        ):
            assert served.client.get("/v1/models", headers={name: value}).status_code == status


def test_another_name_is_refused_unless_it_is_allowed(tokenizer: Tokenizer) -> None:
    name = {"host": "Spark.tail1234.ts.net:443"}
    with scripted(tokenizer) as (served, _):
        error = served.client.get("/health", headers=name).json()["error"]
        assert "--allow-host" in error["message"] and "spark.tail1234.ts.net" in error["message"]
    with scripted(tokenizer, other_hosts=["spark.Tail1234.ts.net"]) as (served, _):
        assert served.client.get("/health", headers=name).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_loopback_hosts_are_allowed(tokenizer: Tokenizer, host: str) -> None:
    with scripted(tokenizer, host=host) as (served, _):
        assert served.client.get("/health", headers={"host": "LOCALHOST:80"}).status_code == 200


def test_prompts_are_not_logged(client: httpx.Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.post(CHAT, json=say("my secret"))
    client.post(CHAT, json=say("my secret", temperature=9))
    captured = capfd.readouterr()
    assert "secret" not in captured.out + captured.err


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
