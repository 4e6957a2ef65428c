"""Engine processes, one per GPU: sends requests through sockets and receives replies in the event loop."""

import asyncio
import itertools
import logging
import multiprocessing
import pickle
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.context import SpawnProcess
from typing import Literal, NoReturn

from nanochat.errors import UserError
from nanochat.inference.engine import EngineStats
from nanochat.serve import engine_process
from nanochat.serve.engine_process import (
    HEARTBEAT_SECONDS,
    AbortRequest,
    AddRequest,
    EngineEvent,
    EngineRequest,
    LoadModel,
    ModelLoaded,
    ModelLoader,
    Prompts,
    RequestOutput,
    pack,
)
from nanochat.serve.errors import ApiError
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.protocol import MAX_REPLIES_PER_REQUEST

log = logging.getLogger(__name__)
CLOSE_SECONDS = 5
RESTART_PAUSES = (1, 2, 5, 10, 30, 60)
"""Seconds before an engine process is restarted, by the number of times it died without completing a reply."""
START_SECONDS = 300  # without a heartbeat while a new process imports torch
STALLED_SECONDS = 10  # without a heartbeat until requests go to other engines
MAX_SILENT_SECONDS = 30  # without a heartbeat until the process is replaced
UNAVAILABLE = {
    "stopping": "the server is stopping",
    "loading": "the model is loading",
    "stalled": "the engine does not respond at the moment",
    "failed": "the engine process failed to load the model and will be restarted: see the server's output",
}
StartEngine = Callable[[socket.socket, ModelLoader, int | None], SpawnProcess | threading.Thread]


class ReplyStream:
    """The replies to one API request: iterate over their outputs; `cancel()` when the client disconnects."""

    def __init__(self, engine: "EngineClient", ids: Sequence[int]) -> None:
        self.engine = engine
        self.unfinished = {id: index for index, id in enumerate(ids)}  # reply index by engine request id
        self.tokens = [0] * len(ids)  # generated so far, per reply
        self._outputs: list[RequestOutput] = []
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._arrived.set()

    def cancel(self) -> None:
        """Abort the unfinished replies."""
        for id in self.unfinished:
            self.engine.abort(id)

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield reply index and output. Outputs that arrive while the client is slow are merged.

        Raises ApiError if any of the replies fails.
        """
        while self.unfinished:
            await self._arrived.wait()
            self._arrived.clear()
            outputs, self._outputs = sorted(self._outputs, key=lambda output: output.id), []
            for id, group in itertools.groupby(outputs, lambda output: output.id):
                *_, output = merged = list(group)
                if output.error:
                    raise ApiError(500, output.error)
                index = self.unfinished[id]
                self.tokens[index] = output.num_tokens
                if output.finish_reason:
                    del self.unfinished[id]
                yield index, output._replace(deltas=[delta for output in merged for delta in output.deltas])


def start_process(connection: socket.socket, load: ModelLoader, gpu: int | None) -> SpawnProcess:
    """Start an engine process. Spawned, because CUDA does not survive a fork."""
    process = multiprocessing.get_context("spawn").Process(
        target=engine_process.main, args=(connection, load, gpu), name="engine", daemon=True
    )
    process.start()
    connection.close()  # so that the server's end closes when the process ends
    return process


class EngineClient:
    """One engine process, restarted if it dies or stops responding. Use it in one event loop only."""

    def __init__(self, load: ModelLoader, gpu: int | None = None, start: StartEngine = start_process) -> None:
        """start: runs the engine; tests run it in a thread."""
        self.load = load
        self.gpu = gpu
        self.process: SpawnProcess | threading.Thread | None = None
        self.requested: ModelCard | None = None  # model that the next request will use
        self.loaded: ModelCard | None = None
        self.error: str | None = None  # why no model is loaded
        self.slots = 1  # maximum batch size; a guess until a model is loaded
        self.stats: EngineStats | None = None
        self.replies: dict[int, ReplyStream] = {}  # unfinished, by request id
        self.load_finished = asyncio.Event()  # a model was loaded, or is unusable; cleared when the process dies
        self._last_good: ModelCard | None = None
        self._start = start
        self._ids = itertools.count()
        self._writer: asyncio.StreamWriter | None = None  # never blocks: a stopped process must not stop the server
        self._silent_seconds = 0.0  # since the last message
        self._failures = 0  # since the last complete reply

    @property
    def status(self) -> Literal["ok", "loading", "stalled", "failed"]:
        if self._silent_seconds >= STALLED_SECONDS:
            return "stalled"
        return "ok" if self.loaded else "failed" if self.error else "loading"

    @property
    def is_available(self) -> bool:
        """True if the process accepts requests."""
        return self._writer is not None and self.load_finished.is_set() and self.status != "stalled"

    async def run(self, card: ModelCard) -> None:
        """Keep the process running until cancelled. It loads `card` first."""
        while True:
            try:
                await self._run_process(card)
            except (EOFError, OSError):
                card = self._died(card)
            finally:
                await self._join_process()
            await asyncio.sleep(RESTART_PAUSES[min(self._failures, len(RESTART_PAUSES)) - 1])
            # Not before the pause: Ctrl-C in a terminal ends an engine process that is still starting.
            log.error("%s; restarting it", self.error or "the engine process died")

    async def _run_process(self, card: ModelCard) -> NoReturn:
        """Run one process. Raises EOFError or OSError when it ends."""
        ours, theirs = socket.socketpair()
        self.process = self._start(theirs, self.load, self.gpu)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._silent_seconds = -START_SECONDS
        watch = asyncio.create_task(self._watch())
        try:
            self.use(card)
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                self._handle(pickle.loads(await reader.readexactly(size)))
        finally:
            watch.cancel()
            self._writer.transport.abort()
            self._writer = None
            self.fail_replies("the engine has stopped")

    async def _join_process(self) -> None:
        if self.process:
            await asyncio.to_thread(self.process.join, CLOSE_SECONDS)
            if isinstance(self.process, SpawnProcess) and self.process.is_alive():
                self.process.kill()

    async def _watch(self) -> None:
        """Kill a process that sends no heartbeat, which `_run_process` then notices."""
        while self._silent_seconds < MAX_SILENT_SECONDS:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._silent_seconds += HEARTBEAT_SECONDS
        log.error("the engine process does not respond, killing it")
        if isinstance(self.process, SpawnProcess):
            self.process.kill()
        assert self._writer is not None
        self._writer.transport.abort()

    def use(self, card: ModelCard) -> None:
        """Load a model after finishing the earlier requests."""
        if card != self.requested:
            self.requested = card
            self._send(LoadModel(card))

    def submit(self, prompts: Prompts) -> ReplyStream:
        """Request one reply per prompt."""
        ids = [next(self._ids) for _ in prompts]
        replies = ReplyStream(self, ids)
        for id, (prompt, sampling) in zip(ids, prompts, strict=True):
            self.replies[id] = replies
            self._send(AddRequest(id, prompt, sampling))
        return replies

    def abort(self, id: int) -> None:
        if self.replies.pop(id, None):
            self._send(AbortRequest(id))

    def fail_replies(self, message: str) -> None:
        for id in list(self.replies):
            self._deliver(RequestOutput(id, error=message))

    def _send(self, request: EngineRequest) -> None:
        if self._writer:
            self._writer.write(pack(request))

    def _handle(self, event: EngineEvent) -> None:
        self._silent_seconds = 0.0
        if isinstance(event, ModelLoaded):
            self._model_loaded(event)
        else:
            self.stats = event.stats or self.stats
            for output in event.outputs:
                self._deliver(output)

    def _model_loaded(self, event: ModelLoaded) -> None:
        self.error = event.error
        if event.error is None:
            self.loaded = self._last_good = event.card
            self.slots = event.slots
        else:
            self.loaded = None
            if self.requested == event.card:
                self.requested = None  # the next request for it tries again
                fallback, self._last_good = self._last_good, None  # which is not tried twice
                if fallback:
                    self.use(fallback)
        self.load_finished.set()

    def _deliver(self, output: RequestOutput) -> None:
        if output.finish_reason:
            self._failures = 0
        finished = output.error or output.finish_reason
        replies = self.replies.pop(output.id, None) if finished else self.replies.get(output.id)
        if replies:
            replies.put(output)

    def _died(self, first: ModelCard) -> ModelCard:
        """Record that the process died, most likely out of memory. Return the model for the next one.

        first: the model that the process loaded first.
        """
        card, was_loading = self.requested or first, self.loaded is None or self.requested != self.loaded
        self.loaded = self.requested = self.stats = None
        self._silent_seconds = 0.0
        self._failures += 1
        self.load_finished.clear()
        if was_loading:
            self.error = f"the engine process died while loading {card.description}: see its messages, or free memory"
            card = self._last_good or card
        return card


class EnginePool:
    """Routes requests to the engines and limits the queue."""

    def __init__(
        self,
        registry: ModelRegistry,
        load: ModelLoader,
        *,
        gpus: Sequence[int | None] = (None,),
        max_waiting: int = 64,
        start: StartEngine = start_process,
    ) -> None:
        """gpus: one engine for each; None: the CPU or the only GPU. max_waiting: replies queued in all."""
        self.registry = registry
        self.max_waiting = max_waiting
        self.engines = [EngineClient(load, gpu, start) for gpu in gpus]
        self.is_stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start loading the default model on every engine. Call it in the event loop."""
        self._tasks = [asyncio.create_task(engine.run(self.registry.default)) for engine in self.engines]

    async def wait_until_loaded(self) -> None:
        """Wait until every engine has its model. Raises UserError if one cannot be loaded."""
        for engine in self.engines:
            await engine.load_finished.wait()
            if engine.error:
                raise UserError(engine.error)

    @property
    def unfinished(self) -> int:
        """Replies running or waiting."""
        return sum(len(engine.replies) for engine in self.engines)

    @property
    def running(self) -> int:
        return sum(min(len(engine.replies), engine.slots) for engine in self.engines)

    @property
    def waiting(self) -> int:
        return self.unfinished - self.running

    def submit(self, card: ModelCard, prompts: Prompts) -> ReplyStream:
        """Send the prompts to the least busy engine that has the model.

        If all engines with the model are full, an idle one loads it; if no engine has it, the least busy one loads it
        after finishing its earlier requests. Raises ApiError while no engine is available, or if the queue is full.
        """
        available = [engine for engine in self.engines if engine.is_available]
        if not available or self.is_stopping:
            status = self.status if self.status != "ok" else "loading"
            raise ApiError(503, UNAVAILABLE[status], code=status, headers={"Retry-After": "5"})
        capacity = sum(engine.slots for engine in self.engines) + self.max_waiting
        if len(prompts) > MAX_REPLIES_PER_REQUEST:
            raise ApiError(400, f"n x prompts must be at most {MAX_REPLIES_PER_REQUEST}, got {len(prompts)}", param="n")
        if self.unfinished and len(prompts) > capacity - self.unfinished:
            message = "too many requests are waiting: try again in a moment"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        with_model = [engine for engine in available if engine.requested == card]
        engine = min(with_model or available, key=lambda engine: len(engine.replies))
        idle = [engine for engine in available if not engine.replies]
        if idle and len(engine.replies) >= engine.slots:
            engine = idle[0]
        engine.use(card)
        return engine.submit(prompts)

    @property
    def status(self) -> str:
        """The best status of any engine, or stopping."""
        order = ("ok", *UNAVAILABLE)
        return "stopping" if self.is_stopping else min((engine.status for engine in self.engines), key=order.index)

    async def stop(self, seconds: float) -> None:
        """Reject further requests, and fail the replies that are not finished after `seconds`."""
        self.is_stopping = True
        deadline = time.monotonic() + seconds
        while self.unfinished and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for engine in self.engines:
            engine.fail_replies(UNAVAILABLE["stopping"])

    async def close(self) -> None:
        """Stop the processes; unfinished replies fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
