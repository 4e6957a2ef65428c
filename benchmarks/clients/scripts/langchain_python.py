"""langchain-openai

Invoke, stream, batch, bind_tools, structured output, Responses, completions.
ChatOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", model="nanochat-d20-sft")
"""

import os

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url, model = os.environ["NANOCHAT_URL"] + "/v1", os.environ["NANOCHAT_MODEL"]


class City(BaseModel):
    """A city."""

    name: str
    population: int


def weather(city: str) -> str:
    """Look up the weather."""
    return city


chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=200, temperature=0)
whole = chat.invoke([("system", "Answer briefly."), ("user", "Who are you?")])
assert whole.content and whole.usage_metadata["input_tokens"] > 0
chunks = list(chat.stream([("system", "Answer briefly."), ("user", "Who are you?")]))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert all(answer.content for answer in chat.batch(["What is the sun?", "What is the moon?"]))
assert chat.bind_tools([weather]).invoke("Who are you?").content
assert isinstance(chat.with_structured_output(City).invoke("Name a city."), City)
responses = ChatOpenAI(base_url=url, api_key="none", model=model, use_responses_api=True, max_tokens=100)
assert responses.invoke("Who are you?").text
assert "".join(chunk.text for chunk in responses.stream("Who are you?"))
assert OpenAI(base_url=url, api_key="none", model=model, max_tokens=5).invoke("The sun")
