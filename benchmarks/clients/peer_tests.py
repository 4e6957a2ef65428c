"""Check what the tests of vLLM's and llama.cpp's servers assert, by the names of those tests, and print a table.

python -m benchmarks.clients.peer_tests --url http://127.0.0.1:8000

The server must run without an API key. Each method repeats the assertions of the test of the same name, except those on
the text of one model. The others are tests of features that this server does not have, with the reason.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from nanochat import cli

VLLM_NOT_OURS = {
    "test_prompt_logprobs_chat": "prompt_logprobs: echo with logprobs in /v1/completions instead",
    "test_more_than_one_prompt_logprobs_chat": "as above",
    "test_prompt_logprobs_completion": "as above",
    "test_structured_outputs_choice_chat": "JSON schemas only, which have enum",
    "test_structured_outputs_choice_chat_logprobs": "as above",
    "test_structured_outputs_regex_chat": "JSON schemas only, which have pattern",
    "test_custom_role": "unknown roles are refused, because the chat format has none",
    "test_invocations": "SageMaker's route",
    "test_completion_truncation_side_controls_prompt_truncation": "truncate_prompt_tokens is refused by name",
    "test_show_version": "vLLM's own version",
    "test_server_load": "/load: /health and /metrics have the load",
}
LLAMA_CPP_NOT_OURS = {
    "test_server_props": "/props: /v1/models has the context and the defaults",
    "test_server_slots": "/slots: /metrics has the load",
    "test_load_split_model": "GGUF files",
    "test_no_webui": "the page has no switch",
    "test_server_model_aliases_and_tags": "a model has one name",
    "test_chat_template": "one chat format, not a choice of templates",
    "test_apply_chat_template": "as above; /tokenize accepts messages",
    "test_completion_with_json_schema": "json_schema outside response_format is refused by name",
    "test_completion_with_grammar": "JSON schemas only",
    "test_chat_completion_with_timings_per_token": "timings: /metrics has histograms",
    "test_return_progress": "progress of the prompt",
    "test_completion (and 17 more of /completion)": "llama.cpp's own route: /v1/completions instead",
    "test_responses_stream_with_llama_telemetry": "llama.cpp's own fields",
    "test_tokenize_with_bos": "add_special: the server adds the first token itself",
    "test_tokenize_with_pieces": "with_pieces: /detokenize instead",
    "test_anthropic_tool_use_basic (tool called)": "the model does not call the client's tools",
    "test_anthropic_vision_base64_with_multimodal_model": "text only",
    "test_anthropic_thinking_with_reasoning_model": "no reasoning",
    "test_local_media_file": "text only",
    "test_cors_options": "no other origin is allowed unless --allow-origin names it",
    "test_access_public_endpoint, test_incorrect_api_key, ... (5)": "need a key: tests/serve/test_access.py",
}
SCHEMA = {
    "type": "object",
    "properties": {"result": {"type": "integer"}},
    "required": ["result"],
    "additionalProperties": False,
}
QUESTION = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
TOOL = {"name": "get_weather", "description": "Get the weather", "input_schema": {"type": "object", "properties": {}}}


class NotOurs(Exception):  # noqa: N818  # an outcome, not an error
    """The behavior that a peer's test asserts is not wanted here; the message is the reason."""


class Suite:
    """Tests of one peer; methods named test_* raise AssertionError."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.client = client
        self.model = model

    def post(self, path: str, **body: Any) -> Any:
        """Return the answer to a request, which must succeed."""
        response = self.client.post(path, json={"model": self.model, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, **body: Any) -> Any:
        """Return the error of a request, which must be refused."""
        response = self.client.post(path, json={"model": self.model, **body})
        assert response.status_code == 400, f"status {response.status_code}"
        return response.json()["error"]

    def stream(self, path: str, **body: Any) -> list[Any]:
        """Return the events of a stream."""
        with self.client.stream("POST", path, json={"model": self.model, **body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        return [json.loads(item) for item in data if item != "[DONE]"]

    def chat(self, **fields: Any) -> Any:
        return self.post("/v1/chat/completions", **{"messages": QUESTION, "max_tokens": 8, **fields})

    def chat_stream(self, **fields: Any) -> list[Any]:
        return self.stream("/v1/chat/completions", **{"messages": QUESTION, "max_tokens": 8, **fields})

    def complete(self, **fields: Any) -> Any:
        return self.post(
            "/v1/completions", **{"prompt": "Hello, my name is", "max_tokens": 5, "temperature": 0, **fields}
        )

    def complete_stream(self, **fields: Any) -> list[Any]:
        fields = {"prompt": "What is an LLM?", "max_tokens": 5, "temperature": 0, **fields}
        return self.stream("/v1/completions", **fields)


class Vllm(Suite):
    """tests/entrypoints/openai: test_chat.py, test_completion.py, test_basic.py"""

    def test_no_logprobs_chat(self) -> None:
        assert self.chat(logprobs=False)["choices"][0]["logprobs"] is None

    def test_zero_logprobs_chat(self) -> None:
        content = self.chat(logprobs=True, top_logprobs=0)["choices"][0]["logprobs"]["content"]
        assert content[0]["top_logprobs"] == []

    def test_some_logprobs_chat(self) -> None:
        content = self.chat(logprobs=True, top_logprobs=5, temperature=0)["choices"][0]["logprobs"]["content"]
        assert len(content[0]["top_logprobs"]) == 5

    def test_too_many_chat_logprobs(self) -> None:
        for stream in (True, False):
            self.refused("/v1/chat/completions", messages=QUESTION, logprobs=True, top_logprobs=21, stream=stream)
        assert self.chat()["choices"]

    def test_single_chat_session(self) -> None:
        answer = self.chat(max_completion_tokens=5, min_tokens=5)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 5
        assert self.chat(messages=[*QUESTION, choice["message"], {"role": "user", "content": "again"}])["choices"]

    def test_chat_streaming(self) -> None:
        whole = self.chat(temperature=0)["choices"][0]
        chunks = [chunk["choices"][0] for chunk in self.chat_stream(temperature=0)]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
        assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [whole["finish_reason"]]
        assert chunks[-1]["finish_reason"]

    def test_chat_completion_stream_options(self) -> None:
        assert all(not chunk.get("usage") for chunk in self.chat_stream(stream_options={"include_usage": False}))
        *chunks, last = self.chat_stream(stream_options={"include_usage": True, "continuous_usage_stats": False})
        assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
        usage = last["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > usage["prompt_tokens"] > 0

    def test_structured_outputs_json_chat(self) -> None:
        answer = self.chat(guided_json=SCHEMA, max_tokens=60)
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["result"], int)

    def test_structured_outputs_type_error(self) -> None:
        self.refused("/v1/chat/completions", messages=QUESTION, structured_outputs={"regex": {"1": "Python"}})

    def test_response_format_json_object(self) -> None:
        answer = self.chat(response_format={"type": "json_object"}, max_tokens=100)
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)

    def test_response_format_json_schema(self) -> None:
        format = {"type": "json_schema", "json_schema": {"name": "foo_test", "schema": SCHEMA}}
        answer = self.chat(response_format=format, max_tokens=60)
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["result"], int)

    def test_response_format_text(self) -> None:
        assert self.chat(response_format={"type": "text"})["choices"][0]["message"]["content"] is not None

    def test_extra_fields_allowed(self) -> None:
        assert self.chat(messages=[{"role": "user", "content": "Hi", "extra_field": "0"}])["choices"]

    def test_complex_message_content(self) -> None:
        assert self.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "What is 1+1?"}]}])["choices"]

    def test_long_seed(self) -> None:
        for seed in (-(2**63) - 1, 2**63):
            assert "seed" in self.refused("/v1/chat/completions", messages=QUESTION, seed=seed)["message"]

    def test_chat_completion_n_parameter_non_streaming(self) -> None:
        choices = self.chat(n=3, temperature=1, max_tokens=20)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert len({choice["message"]["content"] for choice in choices}) > 1

    def test_chat_completion_n_parameter_streaming(self) -> None:
        chunks = self.chat_stream(n=2)
        assert {c["choices"][0]["index"] for c in chunks if c["choices"][0]["delta"].get("content")} == {0, 1}

    def test_chat_completion_n_with_seed(self) -> None:
        assert len(self.chat(n=2, seed=42, temperature=0.8)["choices"]) == 2

    def test_chat_completion_n_equals_1(self) -> None:
        assert len(self.chat(n=1)["choices"]) == 1

    def test_single_completion(self) -> None:
        answer = self.complete(min_tokens=5)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        assert self.complete(prompt=[0, 0, 0, 0, 0])["choices"][0]["text"]

    def test_no_logprobs(self) -> None:
        assert self.complete(logprobs=None)["choices"][0]["logprobs"] is None

    def test_zero_logprobs(self) -> None:
        assert len(self.complete(logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0]) == 1

    def test_some_logprobs(self) -> None:
        assert 5 <= len(self.complete(logprobs=5)["choices"][0]["logprobs"]["top_logprobs"][0]) <= 6

    def test_too_many_completion_logprobs(self) -> None:
        for stream in (True, False):
            self.refused("/v1/completions", prompt="a", logprobs=21, stream=stream)
        assert self.complete()["choices"]

    def test_completion_streaming(self) -> None:
        whole = self.complete(prompt="What is an LLM?")["choices"][0]["text"]
        chunks = [chunk["choices"][0] for chunk in self.complete_stream()]
        assert "".join(chunk["text"] for chunk in chunks) == whole
        assert [bool(chunk["finish_reason"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]

    def test_parallel_no_streaming(self) -> None:
        fields = {"prompt": "What is an LLM?", "max_tokens": 50, "temperature": 1, "seed": 42}
        choices = self.complete(n=3, logprobs=0, **fields)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2] and all(c["finish_reason"] for c in choices)
        assert len({choice["text"] for choice in choices}) == 3

    def test_parallel_streaming(self) -> None:
        texts = {0: "", 1: "", 2: ""}
        for chunk in self.complete_stream(n=3, max_tokens=50, temperature=1, seed=42):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert len(set(texts.values())) == 3

    def test_completion_stream_options(self) -> None:
        assert all(not chunk.get("usage") for chunk in self.complete_stream(stream_options={}))
        *_, last = self.complete_stream(stream_options={"include_usage": True})
        assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0

    def test_batch_completions(self) -> None:
        for prompts in (["Hello, my name is"] * 2, [[0, 0, 0, 0, 0]] * 2):
            first, second = self.complete(prompt=prompts)["choices"]
            assert first["text"] == second["text"]
            assert len(self.complete(prompt=prompts, n=2)["choices"]) == 4
            texts = ["", ""]
            for chunk in self.complete_stream(prompt=prompts):
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
            assert texts[0] == texts[1] == first["text"]

    def test_echo_logprob_completion(self) -> None:
        for count in (1, 0):
            choice = self.complete(echo=True, logprobs=count, min_tokens=5)["choices"][0]
            logprobs = choice["logprobs"]
            assert choice["text"].startswith("Hello, my name is") and len(logprobs["tokens"]) > 5
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert all(max(count, 1) <= len(top) <= count + 1 for top in logprobs["top_logprobs"][1:])

    def test_invalid_json_schema(self) -> None:
        self.refused("/v1/completions", prompt="a", guided_json={"type": "object", "properties": {"foo": "bar"}})

    def test_invalid_regex(self) -> None:
        self.refused("/v1/completions", prompt="a", structured_outputs={"regex": "[.*"})

    def test_invalid_grammar(self) -> None:
        self.refused("/v1/completions", prompt="a", structured_outputs={"grammar": "root ::= invalidsyntax"})

    def test_check_health(self) -> None:
        assert self.client.get("/health").status_code == 200

    def test_request_cancellation(self) -> None:
        for _ in range(20):
            with httpx.Client(base_url=self.client.base_url, timeout=0.3) as impatient:
                try:
                    body = {"model": self.model, "messages": QUESTION, "max_tokens": -1, "min_tokens": 10_000}
                    impatient.post("/v1/chat/completions", json=body)
                except httpx.TimeoutException:
                    pass
        assert self.chat(max_tokens=5)["choices"]

    def test_request_wrong_content_type(self) -> None:
        raise NotOurs("answered, because curl sends this type by default")


class LlamaCpp(Suite):
    """tools/server/tests/unit: test_basic.py, test_chat_completion.py, test_tokenize.py, test_compat_*.py"""

    def test_server_start_simple(self) -> None:
        assert self.client.get("/health").status_code == 200

    def test_server_models(self) -> None:
        assert self.model in [card["id"] for card in self.client.get("/models").json()["data"]]

    def test_chat_completion(self) -> None:
        answer = self.post("/chat/completions", messages=QUESTION, max_tokens=8, min_tokens=8)
        assert "cmpl" in answer["id"] and answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["choices"][0]["finish_reason"] == "length"

    def test_chat_completion_stream(self) -> None:
        first, *rest = self.chat_stream(min_tokens=8)
        assert first["choices"][0]["delta"]["role"] == "assistant" and not first["choices"][0]["delta"]["content"]
        assert all("role" not in chunk["choices"][0]["delta"] for chunk in rest)
        assert len({chunk["id"] for chunk in (first, *rest)}) == 1
        assert rest[-1]["choices"][0]["finish_reason"] == "length" and rest[-1]["choices"][0]["delta"] == {}

    def test_chat_completion_with_openai_library(self) -> None:
        assert self.chat(seed=42, temperature=0.8)["choices"][0]["message"]["content"]

    def test_chat_template_assistant_prefill(self) -> None:
        base = self.chat()["usage"]["prompt_tokens"]
        whole = self.chat(messages=[*QUESTION, {"role": "assistant", "content": "Whill"}])
        parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]
        in_parts = self.chat(messages=[*QUESTION, {"role": "assistant", "content": parts}])
        assert whole["usage"]["prompt_tokens"] > base and in_parts["choices"]

    def test_completion_with_response_format(self) -> None:
        for schema, value in (({"const": "42"}, "42"), ({"const": "foooooo"}, "foooooo")):
            formats: list[Any] = [{"type": "json_object", "schema": schema}]
            formats.append({"type": "json_schema", "json_schema": {"schema": schema}})
            for format in formats:
                answer = self.chat(response_format=format, max_tokens=30)
                assert json.loads(answer["choices"][0]["message"]["content"]) == value
        for wrong in ({"type": "sound"}, *({"type": "json_object", "schema": s} for s in (123, {"type": "hiccup"}))):
            self.refused("/v1/chat/completions", messages=QUESTION, response_format=wrong)

    def test_invalid_chat_completion_req(self) -> None:
        wrong: list[Any] = [None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}]]
        for messages in wrong:
            self.refused("/v1/chat/completions", messages=messages)
        self.refused("/v1/chat/completions", messages=[{"role": "system", "content": "test"}, {}])

    def test_logprobs(self) -> None:
        choice = self.chat(logprobs=True, top_logprobs=10, temperature=0, max_tokens=5)["choices"][0]
        content = choice["logprobs"]["content"]
        assert all(entry["logprob"] <= 0 and entry["bytes"] and entry["top_logprobs"] for entry in content)
        assert (
            b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
            == choice["message"]["content"]
        )

    def test_logprobs_stream(self) -> None:
        chunks = self.chat_stream(logprobs=True, top_logprobs=10, temperature=0, max_tokens=5)[1:-1]
        for chunk in chunks:
            content = chunk["choices"][0]["logprobs"]["content"]
            assert all(entry["logprob"] <= 0 and entry["top_logprobs"] for entry in content)

    def test_logit_bias(self) -> None:
        words = ["the", "The", "a", "is", "to", "and", "you", "it"]
        tokens = self.post("/tokenize", content=" " + " ".join(words) + " ")["tokens"]
        text = self.chat(logit_bias={str(token): -100 for token in tokens}, max_tokens=64)["choices"][0]["message"][
            "content"
        ]
        assert text and all(f" {word} " not in text for word in words)

    def test_context_size_exceeded(self) -> None:
        long = [{"role": "user", "content": "What is the best book " * 5000}]
        for stream in (False, True):
            error = self.refused("/v1/chat/completions", messages=long, stream=stream)
            assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]

    def test_chat_completions_multiple_choices(self) -> None:
        choices = self.chat(n=2)["choices"]
        assert len(choices) == 2 and all(choice["message"]["role"] == "assistant" for choice in choices)

    def test_tokenize_detokenize(self) -> None:
        text = "What is the capital of France ?"
        tokens = self.post("/tokenize", content=text)["tokens"]
        assert len(tokens) > 5 and self.post("/detokenize", tokens=tokens)["content"] == text

    def test_responses_with_text_format(self) -> None:
        asked: dict[str, Any] = {"input": "Write an example", "max_output_tokens": 30}
        format: dict[str, Any] = {"type": "json_schema", "name": "test", "schema": {"const": "foooooo"}}
        answer = self.post("/responses", **asked, text={"format": format})
        assert json.loads(answer["output"][0]["content"][0]["text"]) == "foooooo"
        for type in ("json_object", "text"):
            assert self.post("/v1/responses", **asked, text={"format": {"type": type}})["output"]
        self.refused("/v1/responses", **asked, text={"format": {"type": "json_schema", "name": "test"}})

    def test_responses_with_openai_library(self) -> None:
        answer = self.post("/v1/responses", input=QUESTION, max_output_tokens=8, temperature=0.8)
        assert answer["id"].startswith("resp_") and answer["output"][0]["id"].startswith("msg_")

    def test_responses_stream_with_openai_library(self) -> None:
        events = self.stream("/v1/responses", input=QUESTION, max_output_tokens=8, temperature=0.8)
        by_type = {event["type"]: event for event in events}
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        last = by_type.get("response.completed") or by_type["response.incomplete"]
        assert last["response"]["id"] == by_type["response.created"]["response"]["id"]
        item = last["response"]["output"][0]
        assert item["content"][0]["text"] == text == by_type["response.output_text.done"]["text"]
        assert (
            item["id"]
            == by_type["response.output_item.added"]["item"]["id"]
            == by_type["response.content_part.done"]["item_id"]
        )

    def message(self, **fields: Any) -> Any:
        content = {"max_tokens": 50, "messages": [{"role": "user", "content": "Say hello"}], **fields}
        answer = self.post("/v1/messages", **content)
        assert answer["type"] == "message" and answer["role"] == "assistant" and answer["content"]
        return answer

    def test_anthropic_messages_basic(self) -> None:
        answer = self.message()
        assert answer["content"][0]["type"] == "text" and answer["stop_reason"] in ("end_turn", "max_tokens")
        assert answer["usage"]["input_tokens"] > 0 and answer["usage"]["output_tokens"] > 0

    def test_anthropic_messages_with_system(self) -> None:
        self.message(system="You are a helpful assistant.")

    def test_anthropic_messages_multipart_content(self) -> None:
        parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " the answer?"}]
        self.message(messages=[{"role": "user", "content": parts}])

    def test_anthropic_messages_conversation(self) -> None:
        turns = ["Hello", "Hi there!", "How are you?"]
        self.message(messages=[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)])

    def test_anthropic_messages_streaming(self) -> None:
        asked = [{"role": "user", "content": "Say hello"}]
        events = self.stream("/v1/messages", max_tokens=30, messages=asked)
        types = [event["type"] for event in events]
        assert types[:2] == ["message_start", "content_block_start"] and "content_block_delta" in types
        assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert events[0]["message"]["content"] == [] and events[0]["message"]["usage"]["input_tokens"] > 0
        assert events[-2]["delta"]["stop_reason"] and events[-2]["usage"]["output_tokens"] > 0

    def test_anthropic_streaming_content_block_indices(self) -> None:
        events = self.stream("/v1/messages", max_tokens=30, messages=QUESTION[1:], tools=[TOOL])
        assert {event["index"] for event in events if event["type"].startswith("content_block")} == {0}

    def test_anthropic_count_tokens(self) -> None:
        answer = self.post("/v1/messages/count_tokens", messages=QUESTION[1:])
        assert list(answer) == ["input_tokens"] and answer["input_tokens"] > 0

    def test_anthropic_count_tokens_with_system(self) -> None:
        assert self.post("/v1/messages/count_tokens", messages=QUESTION[1:], system="Be kind")["input_tokens"] > 0

    def test_anthropic_count_tokens_no_max_tokens(self) -> None:
        self.test_anthropic_count_tokens()

    def test_anthropic_tool_use_basic(self) -> None:
        self.message(tools=[TOOL])

    def tool_turns(self, result: dict[str, Any], *others: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"type": "tool_use", "id": "test123", "name": "get_weather", "input": {"location": "Paris"}}
        answer = {"type": "tool_result", "tool_use_id": "test123", **result}
        asked: list[Any] = [
            {"role": "user", "content": "What's the weather?"},
            {"role": "assistant", "content": [call]},
        ]
        return [*asked, {"role": "user", "content": [*others, answer]}]

    def test_anthropic_tool_result(self) -> None:
        assert self.message(messages=self.tool_turns({"content": "Sunny, 25°C"}))["content"][0]["type"] == "text"

    def test_anthropic_tool_result_with_text(self) -> None:
        self.message(messages=self.tool_turns({"content": "Sunny, 25°C"}, {"type": "text", "text": "Results:"}))

    def test_anthropic_tool_result_error(self) -> None:
        self.message(messages=self.tool_turns({"content": "City not found", "is_error": True}))

    def test_anthropic_tool_streaming(self) -> None:
        types = {e["type"] for e in self.stream("/v1/messages", max_tokens=20, messages=QUESTION[1:], tools=[TOOL])}
        assert {"message_start", "message_stop"} <= types

    def test_anthropic_vision_format_accepted(self) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
        assert "text only" in self.refused("/v1/messages", messages=[{"role": "user", "content": [image]}])["message"]

    def test_anthropic_stop_sequences(self) -> None:
        self.message(stop_sequences=["\n", "END"])

    def test_anthropic_temperature(self) -> None:
        self.message(temperature=0.5)

    def test_anthropic_top_p(self) -> None:
        self.message(top_p=0.9)

    def test_anthropic_top_k(self) -> None:
        self.message(top_k=40)

    def test_anthropic_missing_messages(self) -> None:
        self.refused("/v1/messages", max_tokens=50)

    def test_anthropic_empty_messages(self) -> None:
        raise NotOurs("refused, as by Anthropic")

    def test_anthropic_thinking(self) -> None:
        self.message(thinking={"type": "enabled", "budget_tokens": 50})

    def test_anthropic_metadata(self) -> None:
        self.message(metadata={"user_id": "test_user_123"})

    def test_anthropic_vs_openai_different_response_format(self) -> None:
        ours, theirs = self.chat(), self.message()
        assert ours["object"] == "chat.completion" and "choices" in ours and "prompt_tokens" in ours["usage"]
        assert "object" not in theirs and "choices" not in theirs and "prompt_tokens" not in theirs["usage"]


@dataclass
class Options:
    """Check what the tests of vLLM's and llama.cpp's servers assert."""

    url: str = "http://127.0.0.1:8000"
    """server, started with chat.sh"""


def main(options: Options) -> None:
    failed = False
    with httpx.Client(base_url=options.url, timeout=120) as client:
        model = next(card["id"] for card in client.get("/v1/models").json()["data"] if card["nanochat"]["default"])
        for suite, not_ours in ((Vllm(client, model), VLLM_NOT_OURS), (LlamaCpp(client, model), LLAMA_CPP_NOT_OURS)):
            results = [*run(suite), *((name, "not ours", reason) for name, reason in not_ours.items())]
            print(f"### {type(suite).__doc__}\n\n| test | result | |\n|---|---|---|")
            for name, result, reason in results:
                print(f"| {name} | {result} | {reason} |")
            counts = [f"{sum(row[1] == kind for row in results)} {kind}" for kind in ("pass", "**fail**", "not ours")]
            print(f"\n{', '.join(counts)}\n", flush=True)
            failed |= any(row[1] == "**fail**" for row in results)
    sys.exit(failed)


def run(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield name, result and reason of each test."""
    for name in vars(type(suite)):
        if name.startswith("test_"):
            try:
                getattr(suite, name)()
                yield name, "pass", ""
            except NotOurs as reason:
                yield name, "not ours", str(reason)
            except Exception as error:
                yield name, "**fail**", f"{type(error).__name__} {error}".replace("\n", " ")[:300]


if __name__ == "__main__":
    cli.run(main, Options)
