"""One engine per GPU: routes requests to engines and limits the queue."""

import asyncio
from collections.abc import Sequence

from nanochat.errors import UserError
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.engine_client import EngineClient, ReplyStream, StartEngine, start_process
from nanochat.serve.engine_process import ModelLoader
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.protocol import ApiError

INITIAL_REPLY_SECONDS = 2.0
MAX_RETRY_AFTER = 60.0
LOADING_RETRY_AFTER = 5.0


class EnginePool:
    """Engines and the requests running or waiting on them."""

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
        self._mean_reply_seconds = INITIAL_REPLY_SECONDS  # moving average

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

    def submit(self, card: ModelCard, prompts: Sequence[tuple[list[int], SamplingParams]]) -> ReplyStream:
        """Send the prompts to the least busy engine that has the model.

        If all engines with the model are full, an idle one loads it; if no engine has it, the least busy one loads it
        after finishing its earlier requests. Raises ApiError while no model is loaded, or if the queue is full.
        """
        if not any(engine.load_finished.is_set() for engine in self.engines):
            raise ApiError(503, "the model is loading", code="loading", retry_after=LOADING_RETRY_AFTER)
        capacity = sum(engine.slots for engine in self.engines) + self.max_waiting
        if len(prompts) > capacity:
            raise ApiError(400, f"n x prompts must be at most {capacity}, got {len(prompts)}", param="n")
        if len(prompts) > capacity - self.unfinished:
            message = "too many requests are waiting: try again in a moment"
            seconds = self._mean_reply_seconds / max(self.unfinished, 1)  # until the next reply finishes
            raise ApiError(429, message, code="queue_full", retry_after=min(max(1.0, seconds), MAX_RETRY_AFTER))
        with_model = [engine for engine in self.engines if engine.requested == card]
        engine = min(with_model or self.engines, key=lambda engine: len(engine.replies))
        idle = [engine for engine in self.engines if not engine.replies]
        if idle and len(engine.replies) >= engine.slots:
            engine = idle[0]
        engine.use(card)
        return engine.submit(prompts)

    def record_reply(self, seconds: float) -> None:
        """Record how long a finished reply took, for the estimate in Retry-After."""
        self._mean_reply_seconds += 0.1 * (seconds - self._mean_reply_seconds)

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))
