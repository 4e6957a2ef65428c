"""pydantic-ai-slim[openai]

Text, stream, history, a tool and NativeOutput, with chat and Responses models.
OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=os.environ["NANOCHAT_URL"] + "/v1", api_key="none")
settings = {"max_tokens": 200, "temperature": 0.0}


class City(BaseModel):
    """A city."""

    name: str
    population: int


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(os.environ["NANOCHAT_MODEL"], provider=provider)
        agent = Agent(model, instructions="Answer briefly.", model_settings=settings)

        @agent.tool_plain
        def weather(city: str) -> str:
            """Look up the weather."""
            return city

        first = await agent.run("Who are you?")
        assert first.output
        assert (await agent.run("And again?", message_history=first.all_messages())).output
        async with agent.run_stream("Who are you?") as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True)]
        assert "".join(pieces) == first.output, (pieces, first.output)
        structured = Agent(model, output_type=NativeOutput(City), model_settings=settings)
        assert isinstance((await structured.run("Name a city.")).output, City)


asyncio.run(main())
