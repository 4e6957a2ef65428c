"""Requests as real clients send them, answered by a real engine: sampling, JSON, log-probabilities, refusals."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.model.gpt import GPT
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.serve.serving import CHAT, INTERNALS, Served, chunks, say, serving

CONTEXT = 256
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return random_model(tokenizer.vocab_size, sequence_len=CONTEXT).eval()


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, model: GPT) -> Iterator[Served]:
    chat = ChatModel("sft", Engine(model, tokenizer))
    with serving(lambda card: chat, tokenizer, cards=[ModelCard("sft", "d4", 300, CONTEXT)]) as served:
        yield served


@pytest.fixture
def client(served: Served) -> httpx.Client:
    return served.client


def choice(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def reply(client: httpx.Client, **fields: Any) -> Any:
    return choice(client, CHAT, {"messages": [USER], "temperature": 0, "max_tokens": 12, **fields})


def refusal(client: httpx.Client, path: str, body: Any, status: int = 400) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert not INTERNALS.search(error["message"]) and "\n" not in error["message"]
    return error


def prompt_of(client: httpx.Client, tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    return tokenizer.decode(client.post("/tokenize", json={"messages": messages}).json()["tokens"])


TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}])
def test_offered_tools_change_nothing(client: httpx.Client, choice: dict[str, Any]) -> None:
    assert reply(client, tools=[TOOL], **choice) == reply(client)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "search"}}])
def test_a_tool_cannot_be_required(client: httpx.Client, choice: Any) -> None:
    assert refusal(client, CHAT, say("hello", tools=[TOOL], tool_choice=choice))["param"] == "tool_choice"


def test_messages_are_read_where_they_stand(client: httpx.Client, tokenizer: Tokenizer) -> None:
    def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **fields}

    def prompt(*messages: dict[str, Any]) -> str:
        return prompt_of(client, tokenizer, *messages).removeprefix("<|bos|>")

    user, start = "<|user_start|>{}<|user_end|>".format, "<|assistant_start|>"
    hi = message("user", "hi")
    assert prompt(hi, message("assistant", "")) == prompt(hi, message("assistant", None)) == prompt(hi)
    assert prompt(hi, message("assistant", "One,")) == f"{user('hi')}{start}One,"
    assert prompt(message("assistant", "Welcome!"), hi) == f"{start}Welcome!<|assistant_end|>{user('hi')}{start}"
    assert prompt(message("system", ""), hi) == user("hi") + start
    assert prompt(message("system", "be brief")) == user("be brief") + start
    assert prompt(hi, message("assistant", "yes"), message("developer", "be brief"), message("user", "so?")).endswith(
        user("be brief\n\nso?") + start
    )
    assert prompt(hi, message("system", "be brief")) == user("hi\n\nbe brief") + start
    called = f'{user("hi")}{start}<|python_start|>f({{"a": 1}})<|python_end|><|output_start|>42<|output_end|>'
    call, result = message("assistant", None, tool_calls=[CALL]), message("tool", "42", tool_call_id="1")
    assert prompt(hi, call, result) == called
    assert prompt(hi, call, result, message("user", "so?")) == f"{called}<|assistant_end|>{user('so?')}{start}"
    assert prompt(hi, message("assistant", None), message("user", "so?")) == user("hi\n\nso?") + start


def test_the_assistants_last_message_is_continued_unless_the_request_declines(client: httpx.Client) -> None:
    partial = [USER, {"role": "assistant", "content": "One, two,"}]
    continued = reply(client, messages=partial, continue_final_message=True, add_generation_prompt=False)
    assert continued == reply(client, messages=partial) != reply(client, messages=partial, continue_final_message=False)
    assert "continue_final_message" in refusal(client, CHAT, say("hello", continue_final_message=True))["message"]


def test_minus_one_means_random_all_and_no_limit(client: httpx.Client) -> None:
    texts = {reply(client, seed=-1, temperature=1)["message"]["content"] for _ in range(3)}
    assert len(texts) == 3
    assert reply(client, top_k=-1, temperature=1, seed=1) == reply(client, top_k=0, temperature=1, seed=1)
    endless = client.post(CHAT, json=say("hello", max_tokens=-1, ignore_eos=True)).json()
    assert endless["usage"]["total_tokens"] == CONTEXT


def tokens(client: httpx.Client, **fields: Any) -> list[str]:
    body = {"prompt": "good day", "temperature": 0, "max_tokens": 20, "logprobs": 0, **fields}
    return choice(client, TEXT, body)["logprobs"]["tokens"]


def test_penalties_and_biases_act(client: httpx.Client, tokenizer: Tokenizer) -> None:
    plain = tokens(client)
    repeats = len(plain) - len(set(plain))
    for penalty in ("frequency_penalty", "presence_penalty"):
        penalized = tokens(client, **{penalty: 2})
        assert len(penalized) - len(set(penalized)) < repeats
        assert tokens(client, **{penalty: 0}) == plain
    (x,) = tokenizer.encode("x")
    assert tokens(client, logit_bias={str(x): 100}) == ["x"] * 20
    assert tokens(client, logit_bias={str(tokenizer.encode(plain[0])[0]): -100})[0] != plain[0]
    assert "logit_bias" in refusal(client, TEXT, {"prompt": "a", "logit_bias": {"99999": 1}})["message"]
    assert "logit_bias" in refusal(client, TEXT, {"prompt": "a", "logit_bias": {"a": 1}})["message"]


def test_replies_end_at_stop_tokens_and_not_before_min_tokens(client: httpx.Client, tokenizer: Tokenizer) -> None:
    plain = tokens(client)
    stop = tokenizer.encode(plain[5])[0]
    first = plain.index(plain[5])
    body = {"prompt": "good day", "temperature": 0, "max_tokens": 20}
    whole, stopped = (choice(client, TEXT, body | extra) for extra in ({}, {"stop_token_ids": [stop]}))
    assert stopped["finish_reason"] == "stop" and whole["text"].startswith(stopped["text"] + plain[first])
    assert plain[first] not in tokens(client, stop_token_ids=[stop], min_tokens=20)
    end = {str(tokenizer.special("<|assistant_end|>")): 100}
    usage = client.post(TEXT, json={"prompt": "a", "logit_bias": end, "min_tokens": 7, "max_tokens": 9}).json()["usage"]
    assert usage["completion_tokens"] == 8
    usage = client.post(TEXT, json={"prompt": "a", "logit_bias": end, "ignore_eos": True, "max_tokens": 9}).json()[
        "usage"
    ]
    assert usage["completion_tokens"] == 9


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "minItems": 2}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"response_format": {"type": "json_object"}}, None),
        ({"response_format": {"type": "json_object", "schema": PERSON}}, PERSON["required"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            PERSON["required"],
        ),
        ({"guided_json": PERSON}, PERSON["required"]),
        ({"guided_json": json.dumps(PERSON)}, PERSON["required"]),
    ],
)
def test_replies_are_json_of_the_schema(client: httpx.Client, fields: dict[str, Any], keys: Any) -> None:
    for seed in range(5):
        body = say("a person?", seed=seed, temperature=1, max_tokens=90, n=2, **fields)
        for own in client.post(CHAT, json=body).json()["choices"]:
            value = json.loads(own["message"]["content"])
            assert own["finish_reason"] == "stop" and isinstance(value, dict)
            assert keys is None or list(value) == keys
    plain = client.post(CHAT, json=say("hello", temperature=0, response_format={"type": "text"})).json()["choices"][0]
    assert not plain["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "objekt"}, {"type": "string", "pattern": "(a"}, {"$ref": "http://x/y"}, "{", []]
)
def test_schemas_that_are_not_supported_are_refused(client: httpx.Client, schema: Any) -> None:
    assert refusal(client, CHAT, say("hello", guided_json=schema))["message"]


@pytest.mark.parametrize("depth", [100, 900, 950, 970, 100_000])
def test_deep_json_is_refused(client: httpx.Client, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    body = f'{{"messages": [{json.dumps(USER)}], "guided_json": {deep}}}'
    assert client.post(CHAT, content=body).status_code == 400


def test_echo_has_the_models_own_logprobs(client: httpx.Client, model: GPT, tokenizer: Tokenizer) -> None:
    text = "The capital of France is Paris \U0001f600, as everyone knows. " * 3
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0, :, : tokenizer.vocab_size].log_softmax(1)
    for sent, shown in ((text, prompt[1:]), (prompt, prompt)):
        own = choice(client, TEXT, {"prompt": sent, "echo": True, "logprobs": 2, "max_tokens": 0})
        logprobs = own["logprobs"]
        assert own["text"] == text and own["finish_reason"] == "length"
        assert [own for own in logprobs["tokens"] if "bytes" not in own] == [
            tokenizer.decode([token]) for token in shown if "\ufffd" not in tokenizer.decode([token])
        ]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for i in range(1, len(shown)):
            position = len(prompt) - len(shown) + i - 1
            assert logprobs["token_logprobs"][i] == pytest.approx(expected[position, shown[i]].item(), abs=1e-4)
            best = max(logprobs["top_logprobs"][i].values())
            assert best == pytest.approx(expected[position].max().item(), abs=1e-4)
            assert logprobs["top_logprobs"][i][logprobs["tokens"][i]] == logprobs["token_logprobs"][i]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert own["text"][offset:].startswith(token) or token.startswith(("bytes:", "<|"))
    end = {str(tokenizer.special("<|assistant_end|>")): 100}
    body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": end}
    assert len(choice(client, TEXT, body)["logprobs"]["tokens"]) == len(prompt)  # lm-eval drops the last one
    whole = choice(client, TEXT, {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0})
    assert len(whole["logprobs"]["tokens"]) == len(prompt) - 1 + 3 and whole["text"].startswith(text)
    body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    pieces = [event["choices"][0] for event in chunks(client, body, TEXT)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name in ("tokens", "text_offset"):
        assert [x for piece in pieces if piece["logprobs"] for x in piece["logprobs"][name]] == whole["logprobs"][name]


def test_top_logprobs_include_the_sampled_token(client: httpx.Client) -> None:
    entries = reply(client, temperature=2, top_k=0, seed=1, logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert any(len(entry["top_logprobs"]) == 3 for entry in entries)
    for entry in entries:
        assert entry["token"] in [other["token"] for other in entry["top_logprobs"]]
    body = {"prompt": "a", "temperature": 2, "top_k": 0, "seed": 1, "logprobs": 1}
    logprobs = choice(client, TEXT, body)["logprobs"]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in top


def test_many_prompts_are_answered_in_order(client: httpx.Client) -> None:
    prompts = [f"{i} " for i in range(100)]
    answer = client.post(TEXT, json={"prompt": prompts, "max_tokens": 1, "echo": True}).json()
    assert [own["text"].startswith(prompt) for own, prompt in zip(answer["choices"], prompts, strict=True)] == [
        True
    ] * 100
    assert "256" in refusal(client, TEXT, {"prompt": prompts, "n": 3})["message"]


LONG = "word " * 300


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"role": "user", "content": LONG}], 0),
        ([{"role": "system", "content": LONG}, USER], 0),
        ([{"role": "system", "content": "be brief"}, USER, {"role": "user", "content": LONG}], 2),
        (
            [
                {"role": "user", "content": LONG * 2},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": LONG},
            ],
            2,
        ),
        ([USER, {"role": "assistant", "content": LONG}], 1),
    ],
)
def test_the_message_that_is_too_long_is_named(client: httpx.Client, messages: list[Any], named: int) -> None:
    error = refusal(client, CHAT, {"messages": messages})
    assert error["code"] == "context_length_exceeded" and error["param"] == f"messages[{named}]"
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]


def test_the_prompt_that_is_too_long_is_named(client: httpx.Client) -> None:
    error = refusal(client, TEXT, {"prompt": ["a", LONG]})
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt[1]"
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {}, ["messages", "required"]),
        (CHAT, [], ["object", "list"]),
        (CHAT, {"messages": "hello"}, ["messages", "list"]),
        (CHAT, {"messages": [5]}, ["messages[0]", "object", "5"]),
        (CHAT, {"messages": [{"role": "user"}]}, ["messages[0]", "content"]),
        (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, ["messages[0].role", "assistant"]),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, ["messages[0].content", "string"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url", "text only"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["content[0].text", "required"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "python", "text": ""}]}]}, ["messages[0]", "tool"]),
        (CHAT, say("hi", temperature="hot"), ["temperature", "number"]),
        (CHAT, say("hi", temperature=3), ["temperature", "at most 2", "3"]),
        (CHAT, say("hi", max_tokens=0), ["max_tokens", "at least 1", "0"]),
        (CHAT, say("hi", max_tokens=1.5), ["max_tokens", "integer", "1.5"]),
        (CHAT, say("hi", stop=["a"] * 17), ["stop", "at most 16", "got 17"]),
        (CHAT, say("hi", stop=5), ["stop", "list", "5"]),
        (CHAT, say("hi", response_format="json"), ["response_format", "object"]),
        (CHAT, say("hi", response_format={"type": "xml"}), ["response_format.type", "json_schema"]),
        (CHAT, say("hi", logit_bias=[1]), ["logit_bias", "object"]),
        (CHAT, say("hi", guided_regex="a+"), ["guided_regex"]),
        (CHAT, say("hi", prompt_logprobs=1), ["prompt_logprobs"]),
        (TEXT, {"prompt": {"a": 1}}, ["prompt", "string"]),
        (TEXT, {"prompt": [1, "a"]}, ["prompt", "string"]),
        (TEXT, {"prompt": [[]]}, ["prompt", "string"]),
        (TEXT, {"prompt": "a", "best_of": 2}, ["best_of"]),
    ],
)
def test_invalid_fields_are_named_in_words(client: httpx.Client, path: str, body: Any, words: list[str]) -> None:
    message = refusal(client, path, body)["message"]
    assert all(word in message for word in words), message


def test_broken_json_is_described_in_words(client: httpx.Client) -> None:
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"messages": }'):
        error = client.post(CHAT, content=content).json()["error"]
        assert not INTERNALS.search(error["message"]) and "body" in error["message"]


def test_unknown_fields_are_ignored_and_logged_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reply(client, favourite_color="blue", typical_p=1, mirostat=0)
    assert len([record for record in caplog.records if "favourite_color" in record.message]) == 1


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_json_needs_no_content_type_except_from_a_browser(client: httpx.Client, headers: dict[str, str]) -> None:
    body = json.dumps(say("hello"))
    assert client.post(CHAT, content=body, headers=headers).status_code == 200
    assert client.post(CHAT, content=body, headers=headers | {"origin": "http://evil.example"}).status_code == 400


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_paths_without_v1_are_openais(client: httpx.Client) -> None:
    assert client.get("/models").json()["data"][0]["max_model_len"] == CONTEXT
    assert choice(client, "/chat/completions", say("hello", model="nanochat"))["message"]["role"] == "assistant"
    assert "text" in choice(client, "/completions", {"prompt": "hello"})


CASES = Path(os.environ.get("NANOCHAT_SHARED", ""), "cases", "api.jsonl")


def read_cases() -> list[dict[str, Any]]:
    if not os.environ.get("NANOCHAT_SHARED"):
        return []
    return [json.loads(line) for line in CASES.read_text().splitlines()]


@pytest.mark.skipif(not os.environ.get("NANOCHAT_SHARED"), reason="NANOCHAT_SHARED does not name the folder with cases")
@pytest.mark.parametrize("case", read_cases(), ids=lambda case: case["case"])
def test_shared_cases(client: httpx.Client, tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    response = client.post(case["path"], json=case["body"])
    assert str(response.status_code) == case["right"][:3], response.text
    if response.status_code != 200:
        message = response.json()["error"]["message"]
        assert not INTERNALS.search(message) and "\n" not in message
        for words in ("tool_choice", "this model reads text only", "at most 16"):
            assert words in message or words not in case["right"]
        return
    own = response.json()["choices"]
    text = own[0]["message"]["content"] if "message" in own[0] else own[0]["text"]
    if "JSON" in case["right"]:
        json.loads(text)
    if "differ" in case["right"]:
        assert client.post(case["path"], json=case["body"]).json()["choices"][0]["message"]["content"] != text
    if "log-probability" in case["right"]:
        first, *rest = own[0]["logprobs"]["token_logprobs"]
        assert first is None and len(rest) == len(tokenizer.encode(case["body"]["prompt"])) - 1
        assert all(logprob < 0 for logprob in rest)
    if case["case"] == "17 prompts":
        assert len(own) == 17
