"""llama-index-llms-openai-like

Chat, stream, complete, a structured answer.
OpenAILike(api_base="http://127.0.0.1:8000/v1", api_key="none", model="nanochat-d20-sft", is_chat_model=True)
"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, model = os.environ["NANOCHAT_URL"] + "/v1", os.environ["NANOCHAT_MODEL"]


class City(BaseModel):
    """A city."""

    name: str
    population: int


llm = OpenAILike(
    api_base=url,
    api_key="none",
    model=model,
    is_chat_model=True,
    max_tokens=200,
    temperature=0,
    should_use_structured_outputs=True,
)
asked = [ChatMessage(role="system", content="Answer briefly."), ChatMessage(role="user", content="Who are you?")]
whole = llm.chat(asked).message.content
assert whole
assert "".join(part.delta for part in llm.stream_chat(asked)) == whole
assert llm.complete("Who are you?").text
assert isinstance(llm.as_structured_llm(City).complete("Name a city.").raw, City)
