"""openai-agents

An agent with a tool, streamed, with a session and with previous_response_id.
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
"""

import asyncio
import os

import agents

model = os.environ["NANOCHAT_MODEL"]
os.environ |= {"OPENAI_BASE_URL": os.environ["NANOCHAT_URL"] + "/v1", "OPENAI_API_KEY": "none"}
agents.set_tracing_disabled(True)


@agents.function_tool
def weather(city: str) -> str:
    """Look up the weather."""
    return f"sunny in {city}"


async def main() -> None:
    agent = agents.Agent(name="Assistant", instructions="Answer briefly.", model=model, tools=[weather])
    first = await agents.Runner.run(agent, "What is your name?")
    assert first.final_output
    second = await agents.Runner.run(agent, "Say it again.", previous_response_id=first.last_response_id)
    assert second.final_output
    session = agents.SQLiteSession("test")
    for question in ("What is the sun?", "And the moon?"):
        assert (await agents.Runner.run(agent, question, session=session)).final_output
    assert len(await session.get_items()) == 4
    streamed = agents.Runner.run_streamed(agent, "What is your name?")
    kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert streamed.final_output


asyncio.run(main())
