"""OpenAI's API over a real socket: requests, responses and errors."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CALL, CONTEXT, ScriptedChatModel
from tests.serve.serving import CHAT, Served, chunks, say, scripted, streamed

Both = tuple[Served, ScriptedChatModel]


@pytest.fixture(scope="module")
def both(tokenizer: Tokenizer) -> Iterator[Both]:
    with scripted(tokenizer, defaults=SamplingParams(max_tokens=100, temperature=0.5, top_k=7)) as both:
        yield both


@pytest.fixture
def client(both: Both) -> httpx.Client:
    return both[0].client


def test_answer_in_one_piece(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = client.post(CHAT, json=say("good day")).json()
    message = {"role": "assistant", "content": "good day", "refusal": None}
    assert answer["object"] == "chat.completion" and answer["model"] == "nanochat-d4-sft"
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    read = len(tokenizer.render_prompt([{"role": "user", "content": "good day"}]))
    written = len(tokenizer.encode("good day")) + 1
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def test_stream_names_the_role_first_and_ends_with_reason_and_usage(client: httpx.Client) -> None:
    role, *text, end, usage = chunks(client, say("good day", stream_options={"include_usage": True}))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed(text) == "good day"
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 1
    assert all(chunk["usage"] is None for chunk in (role, *text, end))
    assert len({chunk["id"] for chunk in (role, *text, end, usage)}) == 1


def test_stream_has_no_usage_unless_asked(client: httpx.Client) -> None:
    assert all("usage" not in chunk for chunk in chunks(client, say("good day")))


def test_tool_calls_are_separate_in_a_stream(client: httpx.Client) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(client, say("calculate"))[1:-1]]
    calls = [delta["nanochat"] for delta in deltas if "nanochat" in delta]
    for kind, text in (("python", "37*45"), ("python_output", "1665")):
        assert "".join(call["text"] for call in calls if call["type"] == kind) == text
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see. It is 1665."


def test_tool_calls_are_separate_in_a_response(client: httpx.Client) -> None:
    message = client.post(CHAT, json=say("calculate")).json()["choices"][0]["message"]
    assert message["content"] == "Let me see. It is 1665."
    assert message["nanochat"]["parts"] == CALL


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_finish_reason_is_length_at_max_tokens(client: httpx.Client, name: str) -> None:
    answer = client.post(CHAT, json=say("count to 9", **{name: 3})).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3


def test_stream_shows_whole_characters_only(client: httpx.Client) -> None:
    events = chunks(client, say("emoji"))
    assert streamed(events) == "a\U0001f600é€!"
    assert "\ufffd" not in json.dumps(events, ensure_ascii=False)


@pytest.mark.parametrize(("stop", "text"), [("day", "good "), (["zzz", "od d"], "go"), ("day!", "good day")])
def test_text_ends_before_a_stop_string_and_none_is_half_shown(client: httpx.Client, stop: Any, text: str) -> None:
    events = chunks(client, say("good day", stop=stop))
    assert streamed(events) == text and events[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_replies_come_with_their_index(client: httpx.Client, both: Both) -> None:
    choices = client.post(CHAT, json=say("good day", n=3, seed=5)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    seeds = [sampling.seed for sampling in both[1].engine.samplings[-3:]]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    events = chunks(client, say("good day", n=2))
    for index in range(2):
        assert streamed([event for event in events if event["choices"][0]["index"] == index]) == "good day"


def test_logprobs_belong_to_the_text(client: httpx.Client) -> None:
    body = say("good day", logprobs=True, top_logprobs=2)
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "good day"
    assert bytes(b for entry in content for b in entry["bytes"]) == b"good day"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    pieces = [event["choices"][0]["logprobs"] for event in chunks(client, body)]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == content


def test_logprobs_of_a_tool_call_are_not_those_of_the_text(client: httpx.Client) -> None:
    body = say("calculate", logprobs=True)
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for event in chunks(client, body):
        (own,) = event["choices"]
        entries = own["logprobs"]["content"] if own["logprobs"] else []
        assert "".join(entry["token"] for entry in entries) == own["delta"].get("content", "")


def test_more_logprobs_than_an_answer_may_hold_are_refused(client: httpx.Client) -> None:
    asked = {"logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 500}
    refused = client.post(CHAT, json=say("hello", **asked))
    assert refused.status_code == 400 and "lower max_tokens" in refused.json()["error"]["message"]
    assert client.post(CHAT, json=say("hello", **asked | {"n": 8})).status_code == 200


def test_logprobs_of_a_stop_string_are_omitted(client: httpx.Client) -> None:
    (choice,) = client.post(CHAT, json=say("good day", logprobs=True, stop="day")).json()["choices"]
    assert "day" not in "".join(entry["token"] for entry in choice["logprobs"]["content"])


def test_sampling_is_what_the_request_asks_and_else_the_default(client: httpx.Client, both: Both) -> None:
    client.post(CHAT, json=say("a"))
    asked = {"temperature": 0, "top_k": 0, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 5}
    client.post(CHAT, json=say("a", seed=7, **asked))
    client.post(CHAT, json=say("a", top_k=None))
    default, own, unlimited = both[1].engine.samplings[-3:]
    assert (default.temperature, default.top_k, default.max_tokens) == (0.5, 7, 100)
    assert own == SamplingParams(5, 0, None, 7, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    assert unlimited.top_k is None
    assert default.seed != unlimited.seed


def test_model_reads_system_message_parts_and_tool_calls(
    client: httpx.Client, both: Both, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": CALL},
        {"role": "user", "content": "again"},
        {"role": "user", "content": "please"},
    ]
    assert client.post(CHAT, json={"messages": messages}).status_code == 200
    assert both[1].engine.prompts[-1] == tokenizer.render_prompt(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello you"},
            {"role": "assistant", "content": CALL},
            {"role": "user", "content": "again\n\nplease"},
        ]
    )


USER = {"role": "user", "content": "hello"}
REFUSED: list[tuple[Any, int]] = [
    ({}, 400),
    ([], 400),
    ("text", 400),
    ({"messages": []}, 400),
    ({"messages": [{"role": "assistant", "content": ""}]}, 400),
    ({"messages": "hello"}, 400),
    ({"messages": [{"role": "user"}]}, 400),
    ({"messages": [{"role": "user", "content": 5}]}, 400),
    ({"messages": [{"role": "robot", "content": "hello"}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400),
    (say("hello", temperature=-1), 400),
    (say("hello", temperature="hot"), 400),
    (say("hello", max_tokens=0), 400),
    (say("hello", max_tokens=True), 400),
    (say("hello", top_k=-3), 400),
    (say("hello", top_p=-0.1), 400),
    (say("hello", seed=10**30), 400),
    (say("hello", n=0), 400),
    (say("hello", n=99), 400),
    (say("hello", stop=[""]), 400),
    (say("hello", stop=["x"] * 17), 400),
    (say("hello", presence_penalty=3), 400),
    (say("hello", tool_choice="required"), 400),
    (say("hello", model="gpt-4"), 404),
    (say("long " * CONTEXT), 400),
    (say("x" * 1_100_000), 413),
    (say("refuse"), 500),
    (say("fail"), 500),
]


@pytest.mark.parametrize(("body", "status"), REFUSED)
def test_refusal_has_openais_shape_and_the_next_request_works(client: httpx.Client, body: Any, status: int) -> None:
    response = client.post(CHAT, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert client.post(CHAT, json=say("hello")).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_a_bad_request(client: httpx.Client, content: bytes) -> None:
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_is_replaced(client: httpx.Client) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud83d \\ud83d\\ude00"}]}'
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "a\ufffd \U0001f600"


def test_error_during_a_stream_is_sent(client: httpx.Client) -> None:
    assert chunks(client, say("fail"))[-1]["error"]["type"] == "server_error"


def test_unknown_fields_are_ignored(client: httpx.Client) -> None:
    body = say("hello", user="me", presence_penalty=0, model=None, logit_bias={}, tools=[], store=True)
    assert client.post(CHAT, json=body).status_code == 200


def test_oldest_turns_are_dropped_and_counted_in_a_header(
    client: httpx.Client, both: Both, tokenizer: Tokenizer
) -> None:
    exchange = [{"role": "user", "content": "count to 3"}, {"role": "assistant", "content": "1 2 3 " * 20}]
    system = {"role": "system", "content": "be brief"}
    response = client.post(CHAT, json={"messages": [system, *exchange * 12, {"role": "user", "content": "and now"}]})
    assert response.status_code == 200
    dropped = int(response.headers["x-nanochat-dropped-messages"])
    assert 0 < dropped < 24 and dropped % 2 == 0
    read = tokenizer.decode(both[1].engine.prompts[-1])
    assert "be brief" in read and "and now" in read and len(both[1].engine.prompts[-1]) < CONTEXT
    assert read.count("<|user_start|>") == 13 - dropped // 2
    assert "x-nanochat-dropped-messages" not in client.post(CHAT, json=say("hello")).headers


def test_text_is_continued(client: httpx.Client) -> None:
    body = {"prompt": "good day", "echo": True, "max_tokens": 50}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    choice = {"index": 0, "text": "good daygood day", "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    events = chunks(client, body, "/v1/completions")
    assert "".join(event["choices"][0]["text"] for event in events) == "good daygood day"


def test_prompts_may_be_many_or_tokens(client: httpx.Client, tokenizer: Tokenizer) -> None:
    def texts(**body: Any) -> list[str]:
        return [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]

    assert texts(prompt=["one", "two"], n=2) == ["one", "one", "two", "two"]
    assert texts(prompt=tokenizer.encode("one")) == ["one"]
    assert texts(prompt=[tokenizer.encode("one"), tokenizer.encode("two")]) == ["one", "two"]


def test_logprobs_of_continued_text_have_the_older_shape(client: httpx.Client) -> None:
    (choice,) = client.post("/v1/completions", json={"prompt": "good day", "logprobs": 1}).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "good day<|assistant_end|>"
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"][-1] == len("good day")
    assert (
        logprobs["token_logprobs"]
        == [-0.5] * len(logprobs["tokens"])
        == [next(iter(top.values())) for top in logprobs["top_logprobs"]]
    )


def test_text_offsets_are_the_starts_of_tokens(client: httpx.Client) -> None:
    body = {"prompt": "calculate", "logprobs": 0, "echo": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    text, logprobs = choice["text"], choice["logprobs"]
    assert text == "calculateLet me see. It is 1665." and logprobs["text_offset"][0] == 0
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token) or token.startswith("<|")
    pieces = [event["choices"][0]["logprobs"] for event in chunks(client, body, "/v1/completions")]
    assert [offset for piece in pieces if piece for offset in piece["text_offset"]] == logprobs["text_offset"]


@pytest.mark.parametrize("prompt", [[10**6], [-1], "long " * CONTEXT, [], [[]], None, {"a": 1}])
def test_invalid_prompt_is_rejected(client: httpx.Client, prompt: Any) -> None:
    response = client.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_tokenize_counts_text_and_conversations(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = client.post("/tokenize", json={"text": "<|bos|> hello"}).json()
    assert answer == {"count": len(answer["tokens"]), "tokens": answer["tokens"], "max_model_len": CONTEXT}
    assert answer["tokens"] == tokenizer.encode("<|bos|> hello")
    conversation = client.post("/tokenize", json={"messages": [USER]}).json()
    assert conversation["tokens"] == tokenizer.render_prompt([{"role": "user", "content": "hello"}])
    assert client.post("/tokenize", json={}).status_code == 400


def test_models_describes_model_and_stage(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card == client.get(f"/v1/models/{card['id']}").json()
    assert card["id"] == "nanochat-d4-sft" and card["object"] == "model"
    assert card["nanochat"]["description"] == "sft d4 step 300" and card["nanochat"]["loaded"]
    assert card["nanochat"]["defaults"]["temperature"] == 0.5
    assert client.get("/v1/models/other").status_code == 404


def test_all_models_are_listed_and_can_be_requested(tokenizer: Tokenizer) -> None:
    base = ModelCard("base", "d4", 9, CONTEXT)
    sft = ModelCard("sft", "d4", 300, CONTEXT)
    with scripted(tokenizer, cards=(sft, base)) as (served, model):
        ids = [card["id"] for card in served.client.get("/v1/models").json()["data"]]
        assert ids == ["nanochat-d4-sft", "nanochat-d4-base"]
        answer = served.client.post(CHAT, json=say("good day", model=ids[1])).json()
        assert answer["model"] == ids[1] and answer["choices"][0]["message"]["content"] == "good day"
        assert model.engine.prompts[-1] == [tokenizer.bos_id, *tokenizer.encode("good day")]  # no chat format
        assert served.client.get("/health").json()["model"] == ids[1]
        assert served.client.post(CHAT, json=say("hello")).json()["model"] == ids[0]
