"""The server's end of an engine's process: requests go in, replies come out in the event loop."""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from nanochat.inference.engine import EngineStats
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve import engine_process
from nanochat.serve.engine_process import Cancel, Listening, Load, Loaded, Loader, Order, Piece, Submit
from nanochat.serve.model_registry import ModelCard

log = logging.getLogger(__name__)
SECONDS_TO_END = 5
Start = Callable[[Connection, Loader, int | None], SpawnProcess | threading.Thread]


class GenerationError(Exception):
    """A reply could not be written; the text is for the client."""


class Answer:
    """The replies to one request, being written: iterate over what arrives, `cancel()` when nobody listens any more.

    Raises GenerationError where the model breaks down over one of them.
    """

    def __init__(self, worker: "Worker", numbers: Sequence[int]) -> None:
        self.worker = worker
        self.under_way = {number: index for index, number in enumerate(numbers)}
        """index among the replies of those that are not complete"""
        self.tokens = [0] * len(numbers)
        """written so far"""
        self._pieces: list[Piece] = []
        self._arrived = asyncio.Event()

    def deliver(self, piece: Piece) -> None:
        """Hand on what came of a step."""
        self._pieces.append(piece)
        self._arrived.set()

    def cancel(self) -> None:
        """Ask the engine to stop what is not complete, which it does within one step."""
        self.worker.cancel(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """A reply's index and what was added to it. What came while the client was busy comes in one piece."""
        while self.under_way:
            await self._arrived.wait()
            self._arrived.clear()
            arrived, self._pieces = self._pieces, []
            for number, group in itertools.groupby(sorted(arrived, key=lambda piece: piece.id), lambda piece: piece.id):
                piece = _joined(list(group))
                if piece.error:
                    raise GenerationError(piece.error)
                index = self.under_way[number]
                self.tokens[index] = piece.tokens
                if piece.finish_reason:
                    del self.under_way[number]
                yield index, piece


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    last = pieces[-1]
    deltas = [delta for piece in pieces for delta in piece.deltas]
    return last._replace(deltas=deltas, logprobs=[entry for piece in pieces for entry in piece.logprobs])


def in_process(connection: Connection, load: Loader, gpu: int | None) -> SpawnProcess:
    """Run an engine in a process of its own. Spawned: CUDA does not survive a fork."""
    process = multiprocessing.get_context("spawn").Process(
        target=engine_process.main, args=(connection, load, gpu), name="engine", daemon=True
    )
    process.start()
    connection.close()  # so that the pipe ends when the process does
    return process


class Worker:
    """One engine. To be used in one event loop."""

    def __init__(self, load: Loader, gpu: int | None = None, start: Start = in_process) -> None:
        """`start` runs the engine's loop; tests take a thread, in which they can follow it."""
        self.load = load
        self.gpu = gpu
        self.wanted: ModelCard | None = None
        """the model that the next request would be answered by"""
        self.loaded: ModelCard | None = None
        self.problem: str | None = None
        """why the last model is not there"""
        self.slots = 1
        """replies that the engine writes at once, as far as is known before it has had a model"""
        self.stats: EngineStats | None = None
        self.answers: dict[int, Answer] = {}
        """by the numbers of the replies under way"""
        self.changed = asyncio.Event()
        """set when a model has been loaded, or could not be; not while the engine starts again"""
        self._start = start
        self._numbers = itertools.count()
        self._connection: Connection | None = None
        self._held: list[Order] | None = []  # until the process listens: a full pipe would stop the event loop
        self._running: SpawnProcess | threading.Thread | None = None
        self._good: ModelCard | None = None  # the last model that could be loaded

    def use(self, card: ModelCard) -> None:
        """Load a model for the requests to come, once those before them are answered; start the engine if need be."""
        if self._connection is None:
            self._connection, theirs = multiprocessing.Pipe()
            self._held = []
            self._running = self._start(theirs, self.load, self.gpu)
            asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)
        if card != self.wanted:
            self.wanted = card
            self._send(Load(card))

    def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]]) -> Answer:
        """Have a reply written to each prompt."""
        numbers = [next(self._numbers) for _ in prompts]
        answer = Answer(self, numbers)
        for number, (prompt, sampling) in zip(numbers, prompts, strict=True):
            self.answers[number] = answer
            self._send(Submit(number, prompt, sampling))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop the replies of an answer that are not complete."""
        for number in answer.under_way:
            if self.answers.pop(number, None):
                self._send(Cancel(number))

    async def close(self) -> None:
        """End the engine; replies under way break off."""
        self._disconnect()
        if self._running:
            await asyncio.to_thread(self._running.join, SECONDS_TO_END)
            if isinstance(self._running, SpawnProcess) and self._running.is_alive():
                self._running.kill()

    def _send(self, order: Order) -> None:
        if self._held is not None:
            self._held.append(order)
            return
        with contextlib.suppress(OSError):  # it has died, which `_receive` learns as well
            if self._connection:
                self._connection.send(order)

    def _receive(self) -> None:
        """Take what the engine has sent."""
        assert self._connection is not None
        try:
            while self._connection.poll():
                report = self._connection.recv()
                if isinstance(report, Listening):
                    held, self._held = self._held or [], None
                    for order in held:
                        self._send(order)
                    continue
                if isinstance(report, Loaded):
                    self._model_loaded(report)
                    continue
                self.stats = report.stats or self.stats
                for piece in report.pieces:
                    self._deliver(piece)
        except (EOFError, OSError):
            self._died()

    def _model_loaded(self, report: Loaded) -> None:
        before, self.loaded = self._good, None if report.problem else report.card
        self._good = self.loaded or before
        self.slots = report.slots or self.slots
        self.problem = report.problem
        if report.problem and self.wanted == report.card:
            self.wanted = None  # a request for it tries again
            if before:
                self.use(before)
        self.changed.set()

    def _deliver(self, piece: Piece) -> None:
        over = piece.error or piece.finish_reason
        answer = self.answers.pop(piece.id, None) if over else self.answers.get(piece.id)
        if answer:
            answer.deliver(piece)

    def _disconnect(self) -> None:
        if self._connection:
            with contextlib.suppress(RuntimeError, OSError):  # the event loop, or the pipe, is closed already
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None
        for number in list(self.answers):
            self._deliver(Piece(number, [], [], 0, error="the engine has stopped"))

    def _died(self) -> None:
        """The process is gone, for want of memory most likely: its replies fail, and a new one takes its place."""
        self._disconnect()
        card, was_loaded = self.wanted, self.loaded is not None
        self.loaded = self.wanted = self.stats = None
        if card and was_loaded:
            log.error("the engine has died and is started again")
            self.changed.clear()
            self.use(card)
        else:
            self.problem = "the engine died while it loaded the model: see above, or free some memory"
            self.changed.set()
