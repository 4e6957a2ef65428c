"""Engine processes, one per GPU: sends requests through pipes and receives replies in the event loop."""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from nanochat.errors import UserError
from nanochat.inference.engine import EngineStats
from nanochat.serve import engine_process
from nanochat.serve.engine_process import (
    AbortRequest,
    AddRequest,
    EngineRequest,
    LoadModel,
    ModelLoaded,
    ModelLoader,
    Prompts,
    RequestOutput,
)
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.protocol import ApiError

log = logging.getLogger(__name__)
CLOSE_SECONDS = 5
StartEngine = Callable[[Connection, ModelLoader, int | None], SpawnProcess | threading.Thread]


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


def start_process(connection: Connection, load: ModelLoader, gpu: int | None) -> SpawnProcess:
    """Start an engine process. Spawned, because CUDA does not survive a fork."""
    process = multiprocessing.get_context("spawn").Process(
        target=engine_process.main, args=(connection, load, gpu), name="engine", daemon=True
    )
    process.start()
    connection.close()  # so that the pipe closes when the process ends
    return process


class EngineClient:
    """One engine process, restarted if it dies. Use it in one event loop only."""

    def __init__(self, load: ModelLoader, gpu: int | None = None, start: StartEngine = start_process) -> None:
        """start: runs the engine; tests run it in a thread."""
        self.load = load
        self.gpu = gpu
        self.requested: ModelCard | None = None  # model that the next request will use
        self.loaded: ModelCard | None = None
        self.error: str | None = None  # of loading the last model
        self.slots = 1  # maximum batch size; a guess until a model is loaded
        self.stats: EngineStats | None = None
        self.replies: dict[int, ReplyStream] = {}  # unfinished, by request id
        self.load_finished = asyncio.Event()  # a model was loaded or failed to load; cleared while restarting
        self._last_good: ModelCard | None = None
        self._start = start
        self._ids = itertools.count()
        self._connection: Connection | None = None
        self._held: list[EngineRequest] | None = []  # until the process reads: a full pipe would block the event loop
        self._process: SpawnProcess | threading.Thread | None = None

    def use(self, card: ModelCard) -> None:
        """Load a model after finishing the earlier requests; start the process if it is not running."""
        if self._connection is None:
            self._connection, engine_end = multiprocessing.Pipe()
            self._held = []
            self._process = self._start(engine_end, self.load, self.gpu)
            asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)
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

    async def close(self) -> None:
        """Stop the process; unfinished replies fail."""
        self._disconnect()
        if self._process:
            await asyncio.to_thread(self._process.join, CLOSE_SECONDS)
            if isinstance(self._process, SpawnProcess) and self._process.is_alive():
                self._process.kill()

    def _send(self, request: EngineRequest) -> None:
        if self._held is not None:
            self._held.append(request)
        elif self._connection:
            with contextlib.suppress(OSError):  # the process has died, which `_receive` handles
                self._connection.send(request)

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            while self._connection.poll():
                event = self._connection.recv()
                held, self._held = self._held or [], None
                for request in held:
                    self._send(request)
                if isinstance(event, ModelLoaded):
                    self._model_loaded(event)
                else:
                    self.stats = event.stats or self.stats
                    for output in event.outputs:
                        self._deliver(output)
        except (EOFError, OSError):
            self._died()

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
        finished = output.error or output.finish_reason
        replies = self.replies.pop(output.id, None) if finished else self.replies.get(output.id)
        if replies:
            replies.put(output)

    def _disconnect(self) -> None:
        if self._connection:
            with contextlib.suppress(RuntimeError, OSError):  # the event loop or the pipe is already closed
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None
        for id in list(self.replies):
            self._deliver(RequestOutput(id, error="the engine has stopped"))

    def _died(self) -> None:
        """Fail the replies of a process that died (most likely out of memory) and restart it."""
        self._disconnect()
        card, was_loaded = self.requested, self.loaded is not None
        self.loaded = self.requested = self.stats = None
        if card and was_loaded:
            log.error("the engine process died, restarting it")
            self.load_finished.clear()
            self.use(card)
        else:
            self.error = "the engine process died while loading the model: see the messages above, or free some memory"
            self.load_finished.set()


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

    def start(self) -> None:
        """Start loading the default model on every engine. Call it in the event loop."""
        for engine in self.engines:
            engine.use(self.registry.default)

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
        after finishing its earlier requests. Raises ApiError while no model is loaded, or if the queue is full.
        """
        if not any(engine.load_finished.is_set() for engine in self.engines):
            raise ApiError(503, "the model is loading", code="loading", headers={"Retry-After": "5"})
        capacity = sum(engine.slots for engine in self.engines) + self.max_waiting
        if len(prompts) > capacity:
            raise ApiError(400, f"n x prompts must be at most {capacity}, got {len(prompts)}", param="n")
        if len(prompts) > capacity - self.unfinished:
            message = "too many requests are waiting: try again in a moment"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        with_model = [engine for engine in self.engines if engine.requested == card]
        engine = min(with_model or self.engines, key=lambda engine: len(engine.replies))
        idle = [engine for engine in self.engines if not engine.replies]
        if idle and len(engine.replies) >= engine.slots:
            engine = idle[0]
        engine.use(card)
        return engine.submit(prompts)

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))
