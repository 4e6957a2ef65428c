"""The server with a real engine process, used by the real clients.

The model is small and its weights are random: it talks nonsense, but the same nonsense for the same seed.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from typing import Any

import anthropic
import ollama
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.sandbox.calculator import Calculator
from nanochat.serve.model_registry import ModelCard
from nanochat.serve.pool import start_process
from tests.conftest import random_model
from tests.serve.scripted import small_tokenizer
from tests.serve.serving import Served, serving, until

CONTEXT = 256
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def load_small(card: ModelCard) -> ChatModel:
    """Create the model in the engine process."""
    tokenizer = small_tokenizer()
    model = random_model(tokenizer.vocab_size, depth=1, sequence_len=CONTEXT).eval()
    return ChatModel(card.source, Engine(model, tokenizer, Calculator(1), max_batch_size=4))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    card = ModelCard("sft", "d1", 0, CONTEXT)
    with serving(load_small, small_tokenizer(), cards=[card], start=start_process, api_key="key") as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_stream_equals_the_complete_response(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "seed": 3, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and whole.usage is not None and 1 <= whole.usage.completion_tokens <= 30
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_is_reproducible_in_any_batch(served: Served) -> None:
    async def ask(seed: int) -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="key") as client:
            answer = await client.chat.completions.create(model="", messages=HELLO, seed=seed, max_tokens=20)
            return answer.choices[0].message.content

    async def all_of(seeds: list[int]) -> list[str | None]:
        return await asyncio.gather(*map(ask, seeds))

    alone = asyncio.run(all_of([5]))
    together = asyncio.run(all_of([5, 6, 7, 8, 5]))
    assert together[0] == together[4] == alone[0]
    assert len(set(together)) > 1


def test_async_client_streams_and_several_replies_differ(served: Served) -> None:
    async def stream() -> dict[int, str]:
        texts = {0: "", 1: "", 2: ""}
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="key") as client:
            async for chunk in await client.chat.completions.create(
                model="", messages=HELLO, n=3, seed=1, max_tokens=20, stream=True
            ):
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        return texts

    assert len(set(asyncio.run(stream()).values())) == 3


def test_text_is_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="", prompt="the quick", max_tokens=5, temperature=0, echo=True)
    assert answer.choices[0].text.startswith("the quick") and answer.usage is not None


def test_every_api_gives_the_same_reply(client: openai.OpenAI, served: Served) -> None:
    chat = client.chat.completions.create(model="", messages=HELLO, temperature=0, max_tokens=20)
    response = client.responses.create(model="", input="hello", temperature=0, max_output_tokens=20)
    message = anthropic.Anthropic(base_url=served.url, api_key="key").messages.create(
        model="", messages=[{"role": "user", "content": "hello"}], max_tokens=20, extra_body={"temperature": 0}
    )
    ollama_client = ollama.Client(served.url, headers={"Authorization": "Bearer key"})
    model = ollama_client.list().models[0].model or ""
    options = {"temperature": 0, "num_predict": 20}
    from_ollama = ollama_client.generate(model, "hello", options=options).response
    (block,) = message.content
    assert block.type == "text"
    assert chat.choices[0].message.content == response.output_text == block.text == from_ollama


def test_errors_are_the_clients_own(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="", messages=HELLO, temperature=3)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": "\x01" * CONTEXT}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_engine_that_dies_is_started_again(client: openai.OpenAI, served: Served) -> None:
    (engine,) = served.pool.engines
    stream = client.chat.completions.create(model="", messages=HELLO, seed=2, stream=True, max_tokens=200)
    next(iter(stream))
    process = engine.process
    assert isinstance(process, SpawnProcess) and process.pid
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: engine.process is not process and engine.loaded)
    assert client.chat.completions.create(model="", messages=HELLO, max_tokens=3).choices
