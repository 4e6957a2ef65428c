"""litellm

Chat and streams through its openai, anthropic and ollama_chat providers, Responses, completions.
completion(model="openai/nanochat-d20-sft", api_base="http://127.0.0.1:8000/v1", api_key="none")
"""

import os

import litellm

url, model = os.environ["NANOCHAT_URL"], os.environ["NANOCHAT_MODEL"]
litellm.suppress_debug_info = True
asked = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 30, "temperature": 0}
texts = set()
for provider, base in (("openai", f"{url}/v1"), ("anthropic", url), ("ollama_chat", url)):
    to = {"model": f"{provider}/{model}", "api_base": base, "api_key": "none"}
    whole = litellm.completion(**to, **asked)
    text = whole.choices[0].message.content
    chunks = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**to, **asked, stream=True)]
    assert text and "".join(chunks) == text, (provider, text, chunks)
    assert whole.usage.completion_tokens > 0
    texts.add(text)
assert len(texts) == 1, texts
response = litellm.responses(model=f"openai/{model}", api_base=f"{url}/v1", api_key="none", input="Who are you?")
assert response.output[0].content[0].text
continued = litellm.text_completion(
    model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="none", prompt="The sun", max_tokens=5
)
assert continued.choices[0].text
