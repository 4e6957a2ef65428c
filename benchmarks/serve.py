"""How the server stands 64 clients at once: some leave in the middle of a reply, some send rubbish.

python -m benchmarks.serve

A model of random weights is served as chat.sh does it, by a server and an engine in processes of their own; the
clients are in this one. Ends with exit code 1 if an answer was wrong, a reply incomplete, or memory grew.
"""

import asyncio
import functools
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanochat import cli
from nanochat.data import demo_data
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.serve import http_server
from nanochat.serve.app import create_app
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.pool import Pool
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

CONTEXT = 1024
VOCAB_SIZE = 8192
MOST_MEMORY_GROWTH = 0.05
MOST_SECONDS_FOR_HEALTH = 0.05
LEAST_SHARE_OF_THE_MEDIAN = 0.5
RUBBISH = [b"{", b"\xff\x00", b'{"messages": 1}', b'{"messages": [], "n": 1e9}', b"[" * 10_000, b""]
HEADER_END = b"\r\n\r\n"


@dataclass
class BenchmarkOptions:
    """Many clients at once, for some time."""

    clients: int = 64
    """a quarter of them leave in the middle of every reply, an eighth send rubbish"""
    seconds: float = 180.0
    depth: int = 4
    max_tokens: int = 64
    """of a reply"""
    max_batch_size: int = 16
    max_waiting: int = 64

    def __post_init__(self) -> None:
        check_range("clients", self.clients, 8)


@dataclass
class Tally:
    """What the clients have seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    """seconds, of replies that were read to their end"""
    health: list[float] = field(default_factory=list)
    """seconds that /health took"""
    tokens: Counter[int] = field(default_factory=Counter)
    """by client, of those who read to the end"""
    complete: int = 0
    left: int = 0


def card_of(options: BenchmarkOptions) -> ModelCard:
    return ModelCard("sft", f"d{options.depth}", 0, CONTEXT)


def random_chat(card: ModelCard, slots: int) -> ChatModel:
    """The model in the engine's process. It never ends a turn by itself, so that every reply has the same length."""
    runtime = Runtime.start()
    tokenizer = Tokenizer.train(demo_data.documents("train"), VOCAB_SIZE)
    torch.manual_seed(0)
    config = GPTConfig.from_depth(int(card.model_tag[1:]), VOCAB_SIZE, CONTEXT)
    model = GPT(config, runtime.compute_dtype).to(runtime.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return ChatModel(card.source, card.model_tag, card.step, Engine(model, tokenizer, Calculator(), slots))


def serve(options: BenchmarkOptions, pipe: Connection) -> None:
    """The server's process."""
    card = card_of(options)
    chat = functools.partial(random_chat, slots=options.max_batch_size)
    pool = Pool(ModelRegistry(card), chat, max_waiting=options.max_waiting)
    listener = http_server.bind("127.0.0.1", 0)
    tokenizer = Tokenizer.train(demo_data.documents("train"), VOCAB_SIZE)
    app = create_app(pool, tokenizer, on_loaded=lambda problem: pipe.send(listener.getsockname()[1]))
    http_server.Server().run(app, listener)


@asynccontextmanager
async def requested(port: int, path: str, body: bytes | None) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """Status and body of a response. A client library would take the processor's time from the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        method = "GET" if body is None else "POST"
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json"]
        lines.append(f"Content-Length: {len(body or b'')}")
        writer.write("\r\n".join(lines).encode() + HEADER_END + (body or b""))
        head = await reader.readuntil(HEADER_END)
        yield int(head.split(b" ", 2)[1]), reader
    finally:
        writer.close()


async def events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """The JSON objects of a stream, and "[DONE]"."""
    async for line in reader:
        if line.startswith(b"data: "):
            yield "[DONE]" if line.startswith(b"data: [DONE]") else json.loads(line[6:])


async def ask(
    port: int, client: int, rng: random.Random, leaves: bool, options: BenchmarkOptions, tally: Tally
) -> None:
    """One request of a client that behaves, but may leave."""
    words = " ".join(rng.choice(("sun", "moon", "tree", "river", "stone")) for _ in range(rng.randrange(5, 60)))
    fields = {"max_tokens": options.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    body = {"messages": [{"role": "user", "content": f"{client} {words}"}], "seed": rng.randrange(2**31), **fields}
    began, first, text, tokens, reason, done = time.monotonic(), 0.0, 0, 0, None, False
    leave_after = rng.randrange(1, 10) if leaves else None
    async with requested(port, "/v1/chat/completions", json.dumps(body).encode()) as (status, reader):
        tally.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(1)
            return
        if status != 200:
            tally.wrong.append(f"status {status} to a good request")
            return
        async for event in events(reader):
            if event == "[DONE]":
                done = True
            elif "error" in event:
                tally.wrong.append(str(event["error"]))
            elif event["usage"]:
                tokens = event["usage"]["completion_tokens"]
            else:
                (choice,) = event["choices"]
                reason = choice["finish_reason"] or reason
                text += bool(choice["delta"].get("content") or choice["delta"].get("nanochat"))
                first = first or (time.monotonic() if text else 0.0)
                if leave_after and text >= leave_after:
                    tally.left += 1
                    return
    if not (done and reason and 0 < tokens <= options.max_tokens):
        tally.wrong.append(f"incomplete: {tokens} tokens, finish_reason {reason}, done {done}")
    tally.complete += 1
    tally.tokens[client] += tokens
    tally.first_token.append((first or time.monotonic()) - began)


async def rubbish(port: int, rng: random.Random, tally: Tally) -> None:
    """One request that cannot be understood."""
    async with requested(port, rng.choice(("/v1/chat/completions", "/tokenize")), rng.choice(RUBBISH)) as (status, _):
        tally.statuses[status] += 1
        if status != 400:
            tally.wrong.append(f"status {status} to rubbish")
    await asyncio.sleep(0.5)


async def load(port: int, options: BenchmarkOptions, pids: list[int]) -> tuple[Tally, list[int]]:
    """All clients for the time of the run; what they saw, and the memory of the processes every second."""
    tally, memory = Tally(), []
    end = time.monotonic() + options.seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            if number % 8 == 1:
                await rubbish(port, rng, tally)
            else:
                await ask(port, number, rng, number % 4 == 0, options, tally)

    async def watch() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            async with requested(port, "/health", None) as (status, _):
                tally.health.append(time.monotonic() - began)
                if status != 200:
                    tally.wrong.append(f"/health says {status}")
            memory.append(sum(map(resident_bytes, pids)))
            await asyncio.sleep(0.5)

    await asyncio.gather(watch(), *(client(number) for number in range(options.clients)))
    return tally, memory


def resident_bytes(pid: int) -> int:
    """A process's memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(one for child in children for one in descendants(child))]


def main(options: BenchmarkOptions) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(options, theirs))
    server.start()
    try:
        port = ours.recv()
        assert server.pid
        tally, memory = asyncio.run(load(port, options, descendants(server.pid)))
    finally:
        server.terminate()
        server.join()
    sys.exit(report(options, tally, memory))


def report(options: BenchmarkOptions, tally: Tally, memory: list[int]) -> int:
    """Print what was seen; 1 if something should not be so."""
    # One that got nothing counts too; those that leave, or send rubbish, never get a whole reply.
    askers = [number for number in range(options.clients) if number % 8 != 1 and number % 4 != 0]
    rates = sorted(tally.tokens[number] / options.seconds for number in askers)
    fair = rates[0] / statistics.median(rates)
    settled, last = memory[len(memory) // 4], max(memory[-10:])
    growth = last / settled - 1

    def milliseconds(times: list[float]) -> str:
        p99 = statistics.quantiles(times, n=100, method="inclusive")[-1]
        return (
            f"median {statistics.median(times) * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, most {max(times) * 1000:.0f} ms"
        )

    print(f"{options.clients} clients for {options.seconds:.0f} s, depth {options.depth}, {Runtime.start().describe()}")
    print(f"replies: {tally.complete} complete, {tally.left} left; {sum(rates):.0f} tokens/s in these")
    print(f"refused: {tally.statuses[429]} with 429, {tally.statuses[400]} pieces of rubbish with 400")
    print(f"time to first token: {milliseconds(tally.first_token)}")
    print(f"/health: {milliseconds(tally.health)}")
    print(f"tokens/s of a client: slowest {rates[0]:.1f}, median {statistics.median(rates):.1f}: {fair:.0%}")
    print(f"memory: {settled / 1e6:.0f} MB after a quarter of the time, {last / 1e6:.0f} MB at the end: {growth:+.1%}")
    wrong = list(tally.wrong)
    if growth > MOST_MEMORY_GROWTH:
        wrong.append("memory grows")
    if statistics.quantiles(tally.health, n=100, method="inclusive")[-1] > MOST_SECONDS_FOR_HEALTH:
        wrong.append(f"/health takes more than {MOST_SECONDS_FOR_HEALTH * 1000:.0f} ms at p99")
    if fair < LEAST_SHARE_OF_THE_MEDIAN:
        wrong.append("one client gets less than half of what the median gets")
    for complaint, times in Counter(wrong).most_common(10):
        print(f"wrong, {times} times: {complaint}")
    return bool(wrong)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
