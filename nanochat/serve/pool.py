"""The engines of this machine, one a GPU: which of them answers a request, and when there are too many."""

import asyncio
import time
from collections.abc import Sequence

from nanochat.errors import UserError
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.engine_process import Loader
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.worker import Answer, Start, Worker, in_process

SECONDS_OF_A_REPLY = 2.0
"""assumed until some have been written"""
LONGEST_RETRY_AFTER = 60.0


class QueueFullError(Exception):
    """The queue is full: try again after `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests are waiting: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Pool:
    """Engines, and the bounded number of requests that they work on or that wait for them."""

    def __init__(
        self,
        menu: ModelRegistry,
        load: Loader,
        *,
        gpus: Sequence[int | None] = (None,),
        max_waiting: int = 64,
        start: Start = in_process,
    ) -> None:
        """gpus: the GPU of each engine; None: the CPU, or the one GPU there is.
        max_waiting: replies that may wait for a slot; more are refused.
        """
        self.menu = menu
        self.max_waiting = max_waiting
        self.workers = [Worker(load, gpu, start) for gpu in gpus]
        self._seconds_of_a_reply = SECONDS_OF_A_REPLY

    def start(self) -> None:
        """Begin to load the default model everywhere; call it in the event loop."""
        for worker in self.workers:
            worker.use(self.menu.default)

    async def loaded(self) -> None:
        """Wait until every engine has its model. Raises UserError where it cannot be loaded."""
        for worker in self.workers:
            await worker.changed.wait()
            if worker.problem:
                raise UserError(worker.problem)

    @property
    def starting(self) -> bool:
        """Whether no engine has had a model yet."""
        return not any(worker.changed.is_set() for worker in self.workers)

    @property
    def under_way(self) -> int:
        """Replies being written or waiting."""
        return sum(len(worker.answers) for worker in self.workers)

    @property
    def running(self) -> int:
        """Replies being written."""
        return sum(min(len(worker.answers), worker.slots) for worker in self.workers)

    @property
    def waiting(self) -> int:
        """Replies waiting for a slot."""
        return self.under_way - self.running

    def submit(self, card: ModelCard, prompts: Sequence[tuple[list[int], SamplingParams]]) -> Answer:
        """Have the least busy engine write a reply to each prompt.

        An engine that has the model already is preferred, unless all that have are full and another is idle. Where none
        has, the least busy loads it once it has answered what came before; with one engine the models take turns in the
        order of the requests. Raises QueueFullError if too many wait, UserError if so many replies can never fit.
        """
        most = sum(worker.slots for worker in self.workers) + self.max_waiting
        if len(prompts) > most:
            raise UserError(f"{len(prompts)} replies at once are too many (n of each prompt): at most {most} fit")
        if len(prompts) > most - self.under_way:
            raise QueueFullError(self._retry_after())
        have_it = [worker for worker in self.workers if worker.wanted == card]
        worker = min(have_it or self.workers, key=lambda worker: len(worker.answers))
        idle = [worker for worker in self.workers if not worker.answers]
        if idle and len(worker.answers) >= worker.slots:
            worker = idle[0]
        worker.use(card)
        return worker.submit(prompts)

    def finished(self, began: float) -> None:
        """Note that a reply asked for at `began`, by time.monotonic(), is complete."""
        self._seconds_of_a_reply += 0.1 * (time.monotonic() - began - self._seconds_of_a_reply)

    async def close(self) -> None:
        """End all engines."""
        await asyncio.gather(*(worker.close() for worker in self.workers))

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free: replies leave it at this pace."""
        pace = self._seconds_of_a_reply / max(self.under_way, 1)
        return min(max(1.0, pace), LONGEST_RETRY_AFTER)
