"""anthropic

Messages, streams, system, prefill, tools, stop sequences, count_tokens, models, errors.
Anthropic(base_url="http://127.0.0.1:8000", api_key="none")
"""

import os

import anthropic

url, model = os.environ["NANOCHAT_URL"], os.environ["NANOCHAT_MODEL"]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
asked = {
    "model": model,
    "max_tokens": 30,
    "extra_body": {"temperature": 0},  # the newest models of Anthropic do not have it
    "system": [{"type": "text", "text": "Answer briefly.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
    "tools": [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}],
}
whole = client.messages.create(**asked)
(block,) = whole.content
assert block.text and whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream) == block.text
    final = stream.get_final_message()
assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
kinds = [event.type for event in client.messages.create(**asked, stream=True)]
assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
counted = client.messages.count_tokens(**{name: asked[name] for name in ("model", "system", "messages")})
assert counted.input_tokens == whole.usage.input_tokens

stop = block.text[3:6]
stopped = client.messages.create(**asked, stop_sequences=[stop])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
prefill = [*asked["messages"], {"role": "assistant", "content": "I am"}]
continued = client.messages.create(**{**asked, "messages": prefill})
assert continued.usage.input_tokens > whole.usage.input_tokens
tool_turns = [
    *asked["messages"],
    {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
]
assert client.messages.create(**{**asked, "messages": tool_turns}).content
assert model in [card.id for card in client.models.list()]
for wrong in ({"model": "claude"}, {"tool_choice": {"type": "any"}}, {"extra_body": {"temperature": 9}}):
    try:
        client.messages.create(**{**asked, **wrong})
    except (anthropic.NotFoundError, anthropic.BadRequestError) as error:
        assert error.body["type"] == "error"
        print(error.body["error"]["type"], error.body["error"]["message"])
    else:
        raise AssertionError(f"no error: {wrong}")
