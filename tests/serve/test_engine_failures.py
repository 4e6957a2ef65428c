"""Engines that load, fail to load, die, or stop responding."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.serve import engine_process, pool
from nanochat.serve.engine_process import ModelLoader
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CARD, ScriptedChatModel
from tests.serve.serving import CHAT, in_thread, say, serving, until

DEAD = threading.Thread(target=int)
DEAD.start()


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
