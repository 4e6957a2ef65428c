"""Server and terminal around a real engine: a small model with random weights, which talks nonsense."""

import io

import httpx
import pytest
import torch
from rich.console import Console

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import Sampling
from nanochat.sandbox.calculator import Calculator
from nanochat.serve.terminal import TerminalChat
from nanochat.tokenizer import Tokenizer
from tests.serve.test_app import CHAT, chunks, say, serving


@pytest.fixture(scope="module")
def model() -> ChatModel:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog"], 270)
    gpt = GPT(GPTConfig.from_depth(1, tokenizer.vocab_size, 128), torch.float32)
    gpt.init_weights()
    return ChatModel("sft", "d1", 0, Engine(gpt.eval(), tokenizer, Calculator(1), max_batch_size=1))


def test_stream_and_whole_answer_say_the_same(model: ChatModel) -> None:
    with serving(model) as client:
        body = say("hello", seed=3, max_tokens=20)
        whole = client.post(CHAT, json=body).json()
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks(client, body)[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["prompt_tokens"] == len(model.prompt([{"role": "user", "content": "hello"}]))
    assert 1 <= whole["usage"]["completion_tokens"] <= 20


def test_prompt_longer_than_the_context_is_refused_and_one_that_just_fits_is_answered(model: ChatModel) -> None:
    frame = len(model.prompt([{"role": "user", "content": ""}]))
    with serving(model) as client:
        refused = client.post(CHAT, json=say("\x01" * (model.context - frame)))
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        fits: httpx.Response = client.post(CHAT, json=say("\x01" * (model.context - frame - 1)))
        assert fits.json()["usage"]["completion_tokens"] == 1


def test_terminal_says_when_the_conversation_has_become_too_long(model: ChatModel) -> None:
    lines = iter(["hello", "\x01" * 200, "/exit"])
    out = io.StringIO()
    TerminalChat(model, Sampling(max_tokens=5), lambda: next(lines), Console(file=out, width=200)).run()
    assert "/clear begins a new conversation" in out.getvalue()
