"""The benchmark of servers."""

import asyncio

from benchmarks.server_load import timed_reply


def test_tokens_and_first_text_of_a_streamed_reply() -> None:
    events = [
        '{"choices": [{"delta": {"role": "assistant", "content": null}}]}',
        '{"choices": [{"delta": {"content": "A"}}]}',
        '{"choices": [{"delta": {"content": " river"}}]}',
        '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}',
        "[DONE]",
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.writelines(f"data: {event}\n\n".encode() for event in events)
        writer.close()

    async def main() -> tuple[int, float]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await timed_reply(server.sockets[0].getsockname()[1], seed=1, max_tokens=2)

    tokens, first = asyncio.run(main())
    assert tokens == 2
    assert 0 < first < 60
