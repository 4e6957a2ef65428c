"""instructor

Objects of a schema in mode JSON_SCHEMA, whole and as partial objects.
instructor.from_openai(OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
"""

import os

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    population: int


openai_client = openai.OpenAI(base_url=os.environ["NANOCHAT_URL"] + "/v1", api_key="none", max_retries=0)
asked = {
    "model": os.environ["NANOCHAT_MODEL"],
    "messages": [{"role": "user", "content": "Name a city."}],
    "max_tokens": 200,
    "max_retries": 0,
}
client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
assert isinstance(client.chat.completions.create(response_model=City, **asked), City)
*_, last = client.chat.completions.create_partial(response_model=City, **asked)
assert last.name is not None and last.population is not None
