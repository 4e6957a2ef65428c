"""OpenAI's Responses API, Anthropic's and Ollama's, used by their own clients."""

from collections.abc import Iterator

import anthropic
import ollama
import openai
import pytest

from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve import openai_responses
from nanochat.tokenizer import Tokenizer
from tests.serve.scripted import CONTEXT, ScriptedChatModel
from tests.serve.serving import INTERNALS, Served, scripted

MODEL = "nanochat-d4-sft"
Both = tuple[Served, ScriptedChatModel]


@pytest.fixture(scope="module")
def both(tokenizer: Tokenizer) -> Iterator[Both]:
    with scripted(tokenizer, defaults=SamplingParams(max_tokens=100, temperature=0.5, top_k=7)) as both:
        yield both


@pytest.fixture(scope="module")
def openai_client(both: Both) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{both[0].url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(both: Both) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=both[0].url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ollama_client(both: Both) -> ollama.Client:
    return ollama.Client(both[0].url)


def last_prompt(both: Both) -> str:
    _, model = both
    return model.tokenizer.decode(model.engine.prompts[-1])


class TestResponses:
    def test_whole_and_streamed(self, openai_client: openai.OpenAI) -> None:
        whole = openai_client.responses.create(model=MODEL, input="good day")
        assert whole.output_text == "good day" and whole.status == "completed"
        with openai_client.responses.stream(model=MODEL, input="good day") as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert final.output_text == "good day" and final.usage == whole.usage
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events if event.type != "response.output_text.delta"]
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        assert [kind.split(".")[-1] for kind in kinds[2:-1]] == ["added", "added", "done", "done", "done"]

    def test_a_cut_reply_is_incomplete(self, openai_client: openai.OpenAI) -> None:
        cut = openai_client.responses.create(model=MODEL, input="count to 50", max_output_tokens=3)
        assert cut.status == "incomplete" and cut.incomplete_details and cut.usage and cut.usage.output_tokens == 3
        assert cut.incomplete_details.reason == "max_output_tokens"

    def test_earlier_turns_are_remembered_but_not_the_instructions(
        self, both: Both, openai_client: openai.OpenAI
    ) -> None:
        first = openai_client.responses.create(model=MODEL, input="first", instructions="be kind")
        assert first.output_text == "be kind\n\nfirst"
        second = openai_client.responses.create(model=MODEL, input="second", previous_response_id=first.id)
        prompt = last_prompt(both)
        assert prompt.index("first") < prompt.index("be kind") < prompt.index("second")
        assert prompt.count("be kind") == 1 and second.previous_response_id == first.id
        reference = {"type": "item_reference", "id": second.output[0].id}
        turns = [{"role": "user", "content": "hello"}, reference, {"role": "user", "content": "third"}]
        openai_client.responses.create(model=MODEL, input=turns)  # type: ignore[arg-type]
        prompt = last_prompt(both)
        assert prompt.index("hello") < prompt.index("second") < prompt.index("third") and "first" not in prompt

    def test_what_is_not_stored_is_refused(self, openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
        forgotten = openai_client.responses.create(model=MODEL, input="secret", store=False)
        monkeypatch.setattr(openai_responses, "MAX_STORED_CHARACTERS", 500)
        old = openai_client.responses.create(model=MODEL, input="old")
        new = [openai_client.responses.create(model=MODEL, input="x" * 100) for _ in range(3)][-1]
        openai_client.responses.create(model=MODEL, input="more", previous_response_id=new.id)
        for id in (forgotten.id, old.id, "resp_0"):
            with pytest.raises(openai.BadRequestError, match=id) as refused:
                openai_client.responses.create(model=MODEL, input="more", previous_response_id=id)
            assert refused.value.code == "previous_response_not_found"

    def test_a_failure_ends_the_stream(self, openai_client: openai.OpenAI) -> None:
        *_, last = openai_client.responses.create(model=MODEL, input="fail", stream=True)
        assert last.type == "response.failed" and last.response.error and "failed" in last.response.error.message

    def test_errors_use_the_names_of_this_api(self, openai_client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            openai_client.responses.create(model=MODEL, input="hi", max_output_tokens=0)
        assert refused.value.param == "max_output_tokens"
        with pytest.raises(openai.BadRequestError, match="computer_call"):
            openai_client.responses.create(model=MODEL, input=[{"type": "computer_call"}])  # type: ignore[misc, list-item]


class TestAnthropic:
    def test_whole_and_streamed(self, anthropic_client: anthropic.Anthropic) -> None:
        text: anthropic.types.TextBlockParam = {"type": "text", "text": "good day"}
        turns: list[anthropic.types.MessageParam] = [{"role": "user", "content": [text]}]
        whole = anthropic_client.messages.create(model=MODEL, max_tokens=50, messages=turns, system="be kind")
        (block,) = whole.content
        assert block.type == "text" and block.text == "be kind\n\ngood day" and whole.stop_reason == "end_turn"
        with anthropic_client.messages.stream(model=MODEL, max_tokens=50, messages=turns, system="be kind") as stream:
            assert "".join(stream.text_stream) == block.text
            final = stream.get_final_message()
        assert final.usage == whole.usage and final.stop_reason == "end_turn"
        counted = anthropic_client.messages.count_tokens(model=MODEL, messages=turns, system="be kind")
        assert counted.input_tokens == whole.usage.input_tokens

    def test_reasons_to_stop(self, anthropic_client: anthropic.Anthropic) -> None:
        turns: list[anthropic.types.MessageParam] = [{"role": "user", "content": "count to 50"}]
        cut = anthropic_client.messages.create(model=MODEL, max_tokens=3, messages=turns)
        assert cut.stop_reason == "max_tokens"
        stopped = anthropic_client.messages.create(
            model=MODEL, max_tokens=99, messages=turns, stop_sequences=["7", "5"]
        )
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "5")
        assert stopped.content[0].type == "text" and stopped.content[0].text == "1 2 3 4 "

    def test_errors(self, anthropic_client: anthropic.Anthropic) -> None:
        turns: list[anthropic.types.MessageParam] = [{"role": "user", "content": "fail"}]
        with pytest.raises(anthropic.NotFoundError) as unknown:
            anthropic_client.messages.create(model="claude", max_tokens=9, messages=turns)
        assert isinstance(unknown.value.body, dict) and unknown.value.body["type"] == "error"
        with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
            anthropic_client.messages.create(model=MODEL, max_tokens=9, messages=turns, stop_sequences=[""])
        with pytest.raises(anthropic.APIStatusError, match="failed"):
            list(anthropic_client.messages.create(model=MODEL, max_tokens=9, messages=turns, stream=True))


class TestOllama:
    def test_whole_and_streamed(self, both: Both, ollama_client: ollama.Client) -> None:
        turns = [{"role": "user", "content": "good day"}]
        whole = ollama_client.chat(MODEL, turns, options={"num_predict": 50, "num_ctx": 4096, "temperature": 0})
        assert whole.message.content == "good day" and whole.done_reason == "stop"
        sampling = both[1].engine.samplings[-1]
        assert sampling.max_tokens == 50 and sampling.temperature == 0
        chunks = list(ollama_client.chat(MODEL, turns, stream=True))
        assert "".join(chunk.message.content or "" for chunk in chunks) == "good day"
        assert chunks[-1].done and chunks[-1].eval_count == whole.eval_count and not chunks[0].done

    def test_generate(self, both: Both, ollama_client: ollama.Client) -> None:
        assert ollama_client.generate(f"{MODEL}:latest", "good day", system="be kind").response == "be kind\n\ngood day"
        raw = ollama_client.generate(MODEL, "good day", raw=True, stream=True)
        assert "".join(chunk.response or "" for chunk in raw) == "good day"
        assert last_prompt(both) == "<|bos|>good day"
        assert ollama_client.generate(MODEL, keep_alive="1h").done_reason == "load"

    def test_models_are_listed_and_described(self, both: Both, ollama_client: ollama.Client) -> None:
        for models in (ollama_client.list().models, ollama_client.ps().models):
            assert [model.model for model in models] == [f"{MODEL}:latest"]
        shown = ollama_client.show(MODEL)
        assert shown.modelinfo and shown.modelinfo["nanochat.context_length"] == CONTEXT
        assert shown.capabilities == ["completion"]
        assert both[0].client.get("/api/version").json()["version"]

    def test_errors_are_sentences(self, ollama_client: ollama.Client) -> None:
        turns = [{"role": "user", "content": "fail"}]
        with pytest.raises(ollama.ResponseError, match="llama3") as unknown:
            ollama_client.chat("llama3", turns)
        assert unknown.value.status_code == 404 and isinstance(unknown.value.error, str)
        with pytest.raises(ollama.ResponseError, match=r"num_predict"):
            ollama_client.chat(MODEL, turns, options={"num_predict": "many"})
        with pytest.raises(ollama.ResponseError, match="failed"):
            list(ollama_client.chat(MODEL, turns, stream=True))
        with pytest.raises(ollama.ResponseError, match="embeddings"):
            ollama_client.embed(MODEL, "hello")


TURNS = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": 5}),
        ("/v1/responses", {"input": [5]}),
        ("/v1/responses", {"input": "hello", "n": 2}),
        ("/v1/messages", {"messages": TURNS, "n": 2}),
        ("/v1/messages", {"messages": TURNS, "stream_options": "x"}),
        ("/api/chat", {"messages": TURNS, "format": 5}),
        ("/api/chat", {"messages": TURNS, "options": {"n": 2}}),
    ],
)
def test_bad_requests_get_a_sentence_about_the_field(both: Both, path: str, body: dict[str, object]) -> None:
    response = both[0].client.post(path, json=body)
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert response.status_code == 400 and "must be" in message and not INTERNALS.search(message)


def test_embeddings_are_refused_with_the_reason(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        openai_client.embeddings.create(model=MODEL, input="hello")


@pytest.mark.parametrize(("field", "answer"), [("text", "prompt"), ("prompt", "prompt"), ("content", "content")])
def test_tokens_are_converted_back_to_text(both: Both, field: str, answer: str) -> None:
    client = both[0].client
    tokens = client.post("/tokenize", json={field: "good day é"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()[answer] == "good day é"
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
