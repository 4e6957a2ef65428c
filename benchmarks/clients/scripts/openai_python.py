"""openai

Models, chat, streams, logprobs, tools, JSON schema, completions, Responses, errors.
OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""

import os

import openai
from pydantic import BaseModel

url, model = os.environ["NANOCHAT_URL"], os.environ["NANOCHAT_MODEL"]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
hello = [{"role": "user", "content": "Who are you?"}]
weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class City(BaseModel):
    name: str
    population: int


assert model in [card.id for card in client.models.list()]
whole = client.chat.completions.create(model=model, messages=hello, max_tokens=30, temperature=0, tools=[weather])
stream = client.chat.completions.create(
    model=model, messages=hello, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == whole.choices[0].message.content and text
assert chunks[-1].usage == whole.usage
scored = client.chat.completions.create(model=model, messages=hello, max_tokens=5, logprobs=True, top_logprobs=3)
assert all(len(entry.top_logprobs) >= 3 for entry in scored.choices[0].logprobs.content)
parsed = client.chat.completions.parse(model=model, messages=hello, response_format=City, max_tokens=200)
assert isinstance(parsed.choices[0].message.parsed, City)
several = client.completions.create(model=model, prompt=["The sun", "The moon"], max_tokens=4, n=2)
assert len(several.choices) == 4
echoed = client.completions.create(model=model, prompt="The sun is hot", max_tokens=0, echo=True, logprobs=1)
assert echoed.choices[0].logprobs.token_logprobs[0] is None and len(echoed.choices[0].logprobs.tokens) > 1

first = client.responses.create(model=model, input="My name is Ada.", max_output_tokens=30, temperature=0)
assert first.output_text and first.status in ("completed", "incomplete")
second = client.responses.create(model=model, input="Who am I?", previous_response_id=first.id, max_output_tokens=30)
assert second.usage.input_tokens > first.usage.input_tokens
with client.responses.stream(model=model, input="My name is Ada.", max_output_tokens=30, temperature=0) as events:
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events.get_final_response().output_text == first.output_text
assert isinstance(
    client.responses.parse(model=model, input="A city", text_format=City, max_output_tokens=200).output_parsed, City
)

for call in (
    lambda: client.embeddings.create(model=model, input="hello"),
    lambda: client.chat.completions.create(model="gpt-4", messages=hello),
    lambda: client.responses.create(model=model, input="hi", previous_response_id="resp_unknown"),
):
    try:
        call()
    except (openai.NotFoundError, openai.BadRequestError) as error:
        print(error.body["message"])
    else:
        raise AssertionError("no error")
