"""The server, over a real socket, around a model that follows a script."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from nanochat.inference.chat import ChatModel
from nanochat.inference.sampling import Sampling
from nanochat.serve import listen
from nanochat.serve.app import create_app
from tests.serve.scripted import ScriptedChatModel

CHAT = "/v1/chat/completions"


@contextmanager
def serving(model: ChatModel, host: str = "127.0.0.1", **options: Any) -> Iterator[httpx.Client]:
    listener = listen.bind(host, 0)
    server = listen.server(create_app(model, allowed_hosts=listen.allowed_hosts(listener, host), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=listen.url(listener, host), timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def model() -> ScriptedChatModel:
    return ScriptedChatModel()


@pytest.fixture
def client(model: ScriptedChatModel) -> Iterator[httpx.Client]:
    with serving(model, defaults=Sampling(max_tokens=100, temperature=0.5, top_k=7), max_waiting=1) as client:
        yield client


@pytest.fixture(scope="module")
def shared() -> Iterator[httpx.Client]:
    """One server for the many requests that leave nothing behind."""
    with serving(ScriptedChatModel()) as client:
        yield client


def say(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def chunks(client: httpx.Client, body: dict[str, Any]) -> list[Any]:
    """The events of a streamed answer, [DONE] included."""
    with client.stream("POST", CHAT, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def until(condition: Any) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answer_in_one_piece(shared: httpx.Client) -> None:
    answer = shared.post(CHAT, json=say("good day to you")).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "good day to you ", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 15, "completion_tokens": 4, "total_tokens": 19}


def test_stream_names_the_role_first_and_ends_with_reason_usage_and_done(shared: httpx.Client) -> None:
    role, *text, end, usage, done = chunks(shared, say("good day", stream_options={"include_usage": True}))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in text] == [{"content": "good "}, {"content": "day "}]
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 2
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in (role, *text, end, usage)}) == 1


def test_tool_call_streams_beside_the_text(shared: httpx.Client) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(shared, say("calculate"))[1:-2]]
    assert deltas == [
        {"content": "Let me work it out. "},
        {"nanochat": {"type": "python", "text": "37*"}},
        {"nanochat": {"type": "python", "text": "45"}},
        {"nanochat": {"type": "python_output", "text": "1665"}},
        {"content": "It is 1665."},
    ]


def test_tool_call_in_one_piece_comes_beside_the_text(shared: httpx.Client) -> None:
    message = shared.post(CHAT, json=say("calculate")).json()["choices"][0]["message"]
    assert message["content"] == "Let me work it out. It is 1665."
    assert {"type": "python", "text": "37*45"} in message["nanochat"]["parts"]


def test_reply_cut_at_max_tokens_says_length(shared: httpx.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = shared.post(CHAT, json=say("count to 9", **{name: 3})).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("1 2 3 ", "length")


def test_sampling_is_what_the_request_asks_and_else_the_default(client: httpx.Client, model: ScriptedChatModel) -> None:
    client.post(CHAT, json=say("a"))
    client.post(CHAT, json=say("a", temperature=0, top_k=0, seed=-1, max_tokens=5))
    client.post(CHAT, json=say("a", top_k=None))
    (_, default), (_, asked), (_, unlimited) = model.seen
    assert (default.temperature, default.top_k, default.max_tokens) == (0.5, 7, 100)
    assert (asked.temperature, asked.top_k, asked.max_tokens) == (0, None, 5) and asked.seed >= 0
    assert unlimited.top_k is None
    assert default.seed != unlimited.seed


def test_model_sees_system_message_parts_and_tool_calls(client: httpx.Client, model: ScriptedChatModel) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "again"},
    ]
    assert client.post(CHAT, json={"messages": messages}).status_code == 200
    assert model.seen[0][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello you"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "again"},
    ]


USER = {"role": "user", "content": "hello"}
REFUSED: list[tuple[Any, int]] = [
    ({}, 400),
    ([], 400),
    ("text", 400),
    ({"messages": []}, 400),
    ({"messages": "hello"}, 400),
    ({"messages": [{"role": "user"}]}, 400),
    ({"messages": [{"role": "user", "content": 5}]}, 400),
    ({"messages": [{"role": "robot", "content": "hello"}]}, 400),
    ({"messages": [USER, USER]}, 400),
    ({"messages": [USER, {"role": "assistant", "content": "hello"}]}, 400),
    ({"messages": [USER, {"role": "system", "content": "late"}]}, 400),
    ({"messages": [{"role": "system", "content": "alone"}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400),
    (say("hello", temperature=-1), 400),
    (say("hello", temperature="hot"), 400),
    (say("hello", max_tokens=0), 400),
    (say("hello", top_k=-3), 400),
    (say("hello", seed=10**30), 400),
    (say("hello", n=2), 400),
    (say("hello", stop=["x"]), 400),
    (say("hello", model="gpt-4"), 404),
    (say("long " * 1000), 400),
    (say("x" * 1_100_000), 413),
    (say("refuse"), 400),
    (say("fail"), 500),
]


@pytest.mark.parametrize(("body", "status"), REFUSED)
def test_refusal_has_openais_shape_and_the_next_request_works(shared: httpx.Client, body: Any, status: int) -> None:
    response = shared.post(CHAT, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert shared.post(CHAT, json=say("hello")).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_a_bad_request(shared: httpx.Client, content: bytes) -> None:
    response = shared.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_is_replaced(shared: httpx.Client) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud83d \\ud83d\\ude00"}]}'
    response = shared.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "a\ufffd \U0001f600 "


def test_body_of_unannounced_length_is_limited_too(shared: httpx.Client) -> None:
    response = shared.post(
        CHAT, content=(b" " * 100_000 for _ in range(20)), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413


def test_error_in_the_middle_of_a_stream_is_told(shared: httpx.Client) -> None:
    assert chunks(shared, say("refuse"))[1]["error"]["message"].startswith("this cannot be answered")
    assert chunks(shared, say("fail"))[1]["error"]["type"] == "server_error"


def test_unknown_fields_are_ignored(shared: httpx.Client) -> None:
    assert shared.post(CHAT, json=say("hello", user="me", presence_penalty=0, model=None)).status_code == 200


def test_health_answers_at_once_while_a_reply_is_written(client: httpx.Client, model: ScriptedChatModel) -> None:
    with client.stream("POST", CHAT, json=say("wait", stream=True)):
        model.started.wait(10)
        began = time.monotonic()
        health = client.get("/health").json()
        assert time.monotonic() - began < 1
        assert (health["status"], health["running"], health["waiting"]) == ("ok", 1, 0)


def test_requests_wait_their_turn_and_a_full_line_refuses(client: httpx.Client, model: ScriptedChatModel) -> None:
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(client.post, CHAT, json=say("wait"))
        model.started.wait(10)
        second = clients.submit(client.post, CHAT, json=say("hello"))
        until(lambda: client.get("/health").json()["waiting"] == 1)
        refused = client.post(CHAT, json=say("hello"))
        assert refused.status_code == 429 and "retry-after" in refused.headers
        assert refused.json()["error"]["type"] == "rate_limit_error"
        model.go.set()
        assert first.result().json()["choices"][0]["message"]["content"] == "well done"
        assert second.result().json()["choices"][0]["message"]["content"] == "hello "


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_stops_its_reply(client: httpx.Client, model: ScriptedChatModel, stream: bool) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=client.base_url) as leaver:
            request = asyncio.create_task(leaver.post(CHAT, json=say("wait", stream=stream)))
            await asyncio.to_thread(model.started.wait, 10)
            request.cancel()

    asyncio.run(leave())
    assert model.stopped.wait(10)
    until(lambda: client.get("/health").json()["running"] == 0)
    assert client.post(CHAT, json=say("hello")).status_code == 200


def test_client_that_leaves_the_line_gives_up_its_place(client: httpx.Client, model: ScriptedChatModel) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=client.base_url) as leaver:
            waiting = asyncio.create_task(leaver.post(CHAT, json=say("never read")))
            await asyncio.to_thread(until, lambda: client.get("/health").json()["waiting"] == 1)
            waiting.cancel()

    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(client.post, CHAT, json=say("wait"))
        model.started.wait(10)
        asyncio.run(leave())
        until(lambda: client.get("/health").json()["waiting"] == 0)
        model.go.set()
        assert first.result().status_code == 200
    assert [messages[0]["content"] for messages, _ in model.seen] == ["wait"]


def test_server_stops_while_a_reply_is_written(model: ScriptedChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SECONDS_TO_FINISH", 0)
    before = threading.active_count()
    with serving(model) as client:
        stream = client.stream("POST", CHAT, json=say("wait", stream=True))
        stream.__enter__()
        model.started.wait(10)
    assert threading.active_count() == before


def test_models_says_which_model_and_stage_talks(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "nanochat-d4-sft" and card["object"] == "model"
    assert card["nanochat"]["description"] == "sft d4 step 300"
    assert card["nanochat"]["defaults"] == {"temperature": 0.5, "top_k": 7, "max_tokens": 100}


def test_page_and_its_files_ask_no_other_host_for_anything(shared: httpx.Client) -> None:
    page = shared.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    for path in ("/static/chat.css", "/static/chat.js", "/static/icon.svg"):
        assert path in page.text
        response = shared.get(path)
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        assert "https://" not in response.text and "innerHTML" not in response.text


def test_unknown_page_and_wrong_method_have_openais_shape(shared: httpx.Client) -> None:
    assert shared.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    wrong = shared.get(CHAT)
    assert wrong.status_code == 405 and "error" in wrong.json()


def test_pages_of_other_sites_get_nothing(shared: httpx.Client) -> None:
    assert shared.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in shared.get("/health", headers={"origin": "http://evil.example"}).headers
    # A form or a simple fetch of another site may send text/plain without asking; it must not reach the model.
    plain = shared.post(CHAT, content=json.dumps(say("hello")), headers={"content-type": "text/plain"})
    assert plain.status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_a_loopback_host_of_ones_choice_is_answered(host: str) -> None:
    with serving(ScriptedChatModel(), host) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"host": "LOCALHOST:80"}).status_code == 200


def test_prompts_are_not_logged(client: httpx.Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.post(CHAT, json=say("my secret"))
    client.post(CHAT, json=say("my secret", temperature=9))
    captured = capfd.readouterr()
    assert "secret" not in captured.out + captured.err
