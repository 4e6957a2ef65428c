"""Latency, fairness and memory of the server under 64 clients, some of which disconnect or send invalid requests.

python -m benchmarks.server_load

A model with random weights is served like in chat.sh, with the server and the engine in their own processes; all
clients run in this one. The exit code is 1 if a response was wrong, a reply incomplete, or memory grew.

python -m benchmarks.server_load --ports 8000 8080 --max-tokens 256

Compares the speed of running OpenAI-compatible servers, such as chat.sh on port 8000 and llama-server on port 8080.
"""

import asyncio
import functools
import itertools
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

from benchmarks.random_model import random_model
from nanochat import cli
from nanochat.data import demo_data
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.serve import http_server
from nanochat.serve.app import create_app
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.pool import EnginePool
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

CONTEXT = 1024
VOCAB_SIZE = 8192
MAX_MEMORY_GROWTH = 0.05
MAX_HEALTH_SECONDS = 0.05  # 99th percentile
MIN_SHARE_OF_MEDIAN = 0.5  # tokens/s of the slowest client
INVALID_BODIES = [b"{", b"\xff\x00", b'{"messages": 1}', b'{"messages": [], "n": 1e9}', b"[" * 10_000, b""]
HEADER_END = b"\r\n\r\n"


@dataclass
class BenchmarkOptions:
    """Put the server under load and check its replies."""

    clients: int = 64
    """a quarter of them disconnect during every reply, an eighth send invalid requests"""
    seconds: float = 180.0
    depth: int = 4
    max_tokens: int = 64
    """per reply"""
    max_batch_size: int = 16
    max_waiting: int = 64
    ports: tuple[int, ...] = ()
    """only compare the speed of the servers on these local ports"""
    streams: tuple[int, ...] = (1, 16)
    """numbers of concurrent requests to compare"""
    repeats: int = 5
    """timed runs per server, alternating between servers; the median is reported"""

    def __post_init__(self) -> None:
        check_range("clients", self.clients, 8)


@dataclass
class Observations:
    """Everything that the clients measured."""

    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    """seconds, of complete replies"""
    health: list[float] = field(default_factory=list)
    """seconds per request to /health"""
    tokens: Counter[int] = field(default_factory=Counter)
    """in complete replies, per client"""
    complete: int = 0
    aborted: int = 0
    memory: list[int] = field(default_factory=list)
    """bytes of the server's processes, every half second"""


def load_model(card: ModelCard, slots: int) -> ChatModel:
    """Build the engine in its process. The model has no end-of-turn preference, so replies have the same length."""
    tokenizer = Tokenizer.train(demo_data.documents("train"), VOCAB_SIZE)
    model = random_model(int(card.model_tag[1:]), VOCAB_SIZE, CONTEXT, Runtime.start())
    return ChatModel(card.source, Engine(model, tokenizer, Calculator(), slots))


def serve(options: BenchmarkOptions, pipe: Connection) -> None:
    """Run the server and send its port when the model is loaded."""
    card = ModelCard("sft", f"d{options.depth}", 0, CONTEXT)
    load = functools.partial(load_model, slots=options.max_batch_size)
    pool = EnginePool(ModelRegistry(card), load, max_waiting=options.max_waiting)
    listener = http_server.bind("127.0.0.1", 0)
    tokenizer = Tokenizer.train(demo_data.documents("train"), VOCAB_SIZE)
    app = create_app(pool, tokenizer, on_loaded=lambda problem: pipe.send(listener.getsockname()[1]))
    http_server.Server(app, pool.stop).run_on(listener)


@asynccontextmanager
async def send(port: int, path: str, body: bytes | None) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """Status and body of a response. Raw sockets leave more of the CPU to the server than a client library does."""
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


async def read_events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Yield the JSON objects of a stream, and "[DONE]"."""
    async for line in reader:
        if line.startswith(b"data: "):
            yield "[DONE]" if line.startswith(b"data: [DONE]") else json.loads(line[6:])


async def chat(port: int, client: int, rng: random.Random, options: BenchmarkOptions, seen: Observations) -> None:
    """Send one valid request; every fourth client disconnects before the reply is complete."""
    words = " ".join(rng.choice(("sun", "moon", "tree", "river", "stone")) for _ in range(rng.randrange(5, 60)))
    body = {
        "messages": [{"role": "user", "content": f"{client} {words}"}],
        "seed": rng.randrange(2**31),
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    abort_after = rng.randrange(1, 10) if client % 4 == 0 else None
    start, first, num_texts, tokens, reason, done = time.monotonic(), 0.0, 0, 0, None, False
    async with send(port, "/v1/chat/completions", json.dumps(body).encode()) as (status, reader):
        seen.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(1)
            return
        if status != 200:
            seen.errors[f"status {status} for a valid request"] += 1
            return
        async for event in read_events(reader):
            if event == "[DONE]":
                done = True
            elif "error" in event:
                seen.errors[str(event["error"])] += 1
            elif event["usage"]:
                tokens = event["usage"]["completion_tokens"]
            else:
                (choice,) = event["choices"]
                reason = choice["finish_reason"] or reason
                num_texts += bool(choice["delta"].get("content") or choice["delta"].get("nanochat"))
                first = first or (time.monotonic() if num_texts else 0.0)
                if abort_after and num_texts >= abort_after:
                    seen.aborted += 1
                    return
    if not (done and reason and 0 < tokens <= options.max_tokens):
        seen.errors[f"incomplete: {tokens} tokens, finish_reason {reason}, done {done}"] += 1
    seen.complete += 1
    seen.tokens[client] += tokens
    seen.first_token.append((first or time.monotonic()) - start)


async def timed_reply(port: int, seed: int, max_tokens: int) -> tuple[int, float]:
    """Request one reply that does not end early. Return its tokens and the seconds until its first text."""
    content = f"{seed}: " + "Write a story about a river. " * 4
    body = {
        "messages": [{"role": "user", "content": content}],
        "seed": seed,
        "max_tokens": max_tokens,
        "ignore_eos": True,  # llama-server's
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 1,
        "min_p": 0,
    }
    start, first, tokens = time.monotonic(), 0.0, 0
    async with send(port, "/v1/chat/completions", json.dumps(body).encode()) as (status, reader):
        assert status == 200, f"status {status}"
        async for line in reader:  # parsed only as needed, to leave the CPU to the server
            if not first and line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                first = time.monotonic() - start if delta.get("content") or delta.get("nanochat") else 0.0
            elif b'"completion_tokens"' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return tokens, first


async def compare(options: BenchmarkOptions) -> None:
    """Print tokens/s and the time to the first text of all servers, measured in turn."""
    seeds = itertools.count()
    for streams in options.streams:
        speeds: dict[int, list[float]] = {port: [] for port in options.ports}
        delays: dict[int, list[float]] = {port: [] for port in options.ports}
        for repeat in range(-1, options.repeats):  # the first one is a warm-up
            for port in options.ports:
                start = time.monotonic()
                requests = (timed_reply(port, next(seeds), options.max_tokens) for _ in range(streams))
                replies = await asyncio.gather(*requests)
                if repeat >= 0:
                    speeds[port].append(sum(tokens for tokens, _ in replies) / (time.monotonic() - start))
                    delays[port].append(1000 * statistics.median(first for _, first in replies))
        for port in options.ports:
            speed, delay = statistics.median(speeds[port]), statistics.median(delays[port])
            ratio = statistics.median(a / b for a, b in zip(speeds[port], speeds[options.ports[0]], strict=True))
            spread = f"{min(speeds[port]):.0f} to {max(speeds[port]):.0f}"
            print(
                f"port {port}, {streams} streams: {speed:.0f} tokens/s ({spread}), {ratio:.2f} times port "
                f"{options.ports[0]}; first text after {delay:.0f} ms"
            )


async def send_invalid(port: int, rng: random.Random, seen: Observations) -> None:
    path, body = rng.choice(("/v1/chat/completions", "/tokenize")), rng.choice(INVALID_BODIES)
    async with send(port, path, body) as (status, _):
        seen.statuses[status] += 1
        if status != 400:
            seen.errors[f"status {status} for an invalid request"] += 1
    await asyncio.sleep(0.5)


async def run_clients(port: int, options: BenchmarkOptions, pids: list[int]) -> Observations:
    """Run all clients for the given time, with one more that polls /health and the memory of `pids`."""
    seen = Observations()
    end = time.monotonic() + options.seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            if number % 8 == 1:
                await send_invalid(port, rng, seen)
            else:
                await chat(port, number, rng, options, seen)

    async def poll() -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            async with send(port, "/health", None) as (status, _):
                seen.health.append(time.monotonic() - start)
                if status != 200:
                    seen.errors[f"/health returns {status}"] += 1
            seen.memory.append(sum(map(resident_bytes, pids)))
            await asyncio.sleep(0.5)

    await asyncio.gather(poll(), *map(client, range(options.clients)))
    return seen


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def process_tree(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    children = (
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    )
    return [pid, *(one for child in children for one in process_tree(child))]


def main(options: BenchmarkOptions) -> None:
    if options.ports:
        asyncio.run(compare(options))
        return
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(options, theirs))
    server.start()
    try:
        port = ours.recv()
        assert server.pid
        seen = asyncio.run(run_clients(port, options, process_tree(server.pid)))
    finally:
        server.terminate()
        server.join()
    report(options, seen)
    sys.exit(bool(seen.errors))


def report(options: BenchmarkOptions, seen: Observations) -> None:
    """Print the figures, and add those beyond their bounds to the errors."""
    # Clients that read to the end; one that never got a reply counts as 0.
    readers = [number for number in range(options.clients) if number % 8 != 1 and number % 4 != 0]
    rates = sorted(seen.tokens[number] / options.seconds for number in readers)
    fairness = rates[0] / statistics.median(rates)
    settled, last = seen.memory[len(seen.memory) // 4], max(seen.memory[-10:])
    growth = last / settled - 1

    def p99(seconds: list[float]) -> float:
        return statistics.quantiles(seconds, n=100, method="inclusive")[-1]

    print(f"{options.clients} clients for {options.seconds:.0f} s, depth {options.depth}, {Runtime.start().describe()}")
    print(f"replies: {seen.complete} complete ({sum(rates):.0f} tokens/s), {seen.aborted} aborted by the client")
    print(f"refused: {seen.statuses[429]} with 429, {seen.statuses[400]} invalid requests with 400")
    for name, seconds in (("time to first token", seen.first_token), ("/health", seen.health)):
        median, slow, slowest = (1000 * value for value in (statistics.median(seconds), p99(seconds), max(seconds)))
        print(f"{name}: median {median:.0f} ms, p99 {slow:.0f} ms, max {slowest:.0f} ms")
    print(f"tokens/s per client: min {rates[0]:.1f}, median {statistics.median(rates):.1f} ({fairness:.0%})")
    print(f"memory: {settled / 1e6:.0f} MB after a quarter of the time, {last / 1e6:.0f} MB at the end: {growth:+.1%}")
    seen.errors["memory grows"] += growth > MAX_MEMORY_GROWTH
    seen.errors[f"p99 of /health is above {MAX_HEALTH_SECONDS * 1000:.0f} ms"] += p99(seen.health) > MAX_HEALTH_SECONDS
    seen.errors["a client gets less than half of the median's tokens"] += fairness < MIN_SHARE_OF_MEDIAN
    seen.errors = +seen.errors
    for error, count in seen.errors.most_common(10):
        print(f"error ({count} times): {error}")


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
