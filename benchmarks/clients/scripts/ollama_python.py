"""ollama

List, show, ps, chat, generate, streams, JSON schema, tools, options, errors.
OLLAMA_HOST=http://127.0.0.1:8000
"""

import json
import os

import ollama

model = os.environ["NANOCHAT_MODEL"]
client = ollama.Client(os.environ["NANOCHAT_URL"])
listed = [entry.model for entry in client.list().models]
assert f"{model}:latest" in listed, listed
shown = client.show(model)
assert "completion" in shown.capabilities
architecture = shown.modelinfo["general.architecture"]
assert shown.modelinfo[f"{architecture}.context_length"] > 0
client.ps()

asked = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
options = {"temperature": 0, "num_predict": 30, "num_ctx": 4096, "seed": 1}
whole = client.chat(**asked, options=options)
assert whole.message.content and whole.done_reason in ("stop", "length") and whole.eval_count > 0
chunks = list(client.chat(**asked, options=options, stream=True))
assert "".join(chunk.message.content for chunk in chunks) == whole.message.content
assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
generated = client.generate(listed[0], "Who are you?", system="Answer briefly.", options=options)
assert generated.response
raw = client.generate(model, "The capital of France", raw=True, options=options, stream=True)
assert "".join(part.response for part in raw)
schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
assert isinstance(json.loads(client.chat(**asked, format=schema, options={"num_predict": 100}).message.content), dict)
assert isinstance(json.loads(client.chat(**asked, format="json", options={"num_predict": 200}).message.content), dict)
tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
assert client.chat(**asked, tools=[tool], options=options).message.content
assert client.generate(model, keep_alive="5m").done_reason == "load"
for call in (
    lambda: client.chat("llama3", asked["messages"]),
    lambda: client.embed(model, "hello"),
    lambda: client.chat(**asked, options={"temperature": -1}),
    lambda: client.chat(model, [{"role": "user", "content": "What is it?", "images": ["aGVsbG8="]}]),
    lambda: client.pull("llama3"),
):
    try:
        call()
    except ollama.ResponseError as error:
        print(error.status_code, error.error)
        assert isinstance(error.error, str) and "{" not in error.error
    else:
        raise AssertionError("no error")
