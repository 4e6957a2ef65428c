"""The process that owns a model: it takes requests from a pipe and sends back what is written, step by step.

A process and not a thread, because decoding a small model is mostly Python: in one process with it, the event loop
gets Python's lock only between two operations of the model, and the model waits for it in turn.
"""

import logging
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

import torch

from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import Delta, Detokenizer
from nanochat.inference.engine import EngineStats
from nanochat.inference.request import Request, TokenLogprob
from nanochat.inference.sampling_params import SamplingParams
from nanochat.runtime import release_memory
from nanochat.serve.model_registry import ModelCard

log = logging.getLogger(__name__)
Loader = Callable[[ModelCard], ChatModel]
BROKE_DOWN = "the model failed to answer"


class Load(NamedTuple):
    """Talk with this model from here on; what was asked before is answered by the one before."""

    card: ModelCard


class Submit(NamedTuple):
    """Write a reply."""

    id: int
    prompt: list[int]
    sampling: SamplingParams


class Cancel(NamedTuple):
    """Nobody listens any more."""

    id: int


class Listening(NamedTuple):
    """The process is up and empties its pipe from here on."""


class Loaded(NamedTuple):
    """The model is there; or it is not, and why."""

    card: ModelCard
    slots: int
    """replies that it writes at once"""
    problem: str | None = None


class Piece(NamedTuple):
    """What a step added to a reply."""

    id: int
    deltas: list[Delta]
    logprobs: list[list[TokenLogprob]]
    """for each of `deltas`, those of its tokens"""
    tokens: int
    """written so far"""
    finish_reason: Literal["stop", "length"] | None = None
    error: str | None = None
    """what went wrong, for the client; nothing follows"""


class Progress(NamedTuple):
    """What came of a step."""

    pieces: list[Piece]
    stats: EngineStats | None
    """None while there is no model"""


Order = Load | Submit | Cancel
Report = Listening | Loaded | Progress


@dataclass
class _Writing:
    """A reply under way."""

    id: int
    request: Request
    decoder: Detokenizer
    seen: int = 0
    """tokens that have been decoded"""

    def __post_init__(self) -> None:
        self._held: list[TokenLogprob] = []  # of text that is held back: it may become a stop string

    def piece(self, special: set[int]) -> Piece | None:
        """What has come since the last call."""
        completion = self.request.completion
        new, start = completion.tokens[self.seen :], self.seen
        self.seen = len(completion.tokens)
        deltas: list[Delta] = []
        logprobs: list[list[TokenLogprob]] = []

        def add(delta: Delta) -> None:
            deltas.append(delta)
            logprobs.append(self._held)
            self._held = []

        for i, token in enumerate(new, start):
            delta = self.decoder.feed(token)
            if completion.logprobs and (logprob := completion.logprobs[i]) and token not in special:
                self._held.append(logprob)
            if delta:
                add(delta)
        if completion.finish_reason and (rest := self.decoder.flush()):
            add(rest)
        if not deltas and not completion.finish_reason:
            return None
        return Piece(self.id, deltas, logprobs, self.seen, completion.finish_reason)


class EngineLoop:
    """Takes orders and steps the engine while there is something to write."""

    def __init__(self, connection: Connection, load: Loader) -> None:
        self.connection = connection
        self.load = load
        self.chat: ChatModel | None = None
        self.problem = ""
        """why there is no model"""
        self.writing: dict[int, _Writing] = {}
        self._arrived: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._orders: deque[Load | Submit] = deque()

    def run(self) -> None:
        """Work until the pipe is closed, or until the GPU has failed: it answers nothing more in this process."""
        threading.Thread(target=self._receive, name="orders", daemon=True).start()
        try:
            self.connection.send(Listening())
            while self._take_orders():
                if self.writing:
                    self._step()
        except OSError:  # the server is gone
            pass
        except torch.AcceleratorError:
            log.exception("the GPU has failed")
        finally:
            try:
                self._unload()
            finally:
                self.connection.close()

    def _receive(self) -> None:
        """Empty the pipe at all times: the server must never wait until a step is done to put an order in."""
        try:
            while True:
                self._arrived.put(self.connection.recv())
        except (EOFError, OSError):
            self._arrived.put(None)

    def _take_orders(self) -> bool:
        """Note what has arrived, waiting for it if there is nothing to do; False at the end."""
        wait = not self.writing and not self._orders
        while wait or not self._arrived.empty():
            order = self._arrived.get()
            wait = False
            if order is None:
                return False
            if isinstance(order, Cancel):
                self._cancel(order.id)
            else:
                self._orders.append(order)
        while self._orders and not (isinstance(self._orders[0], Load) and self.writing):
            first = self._orders.popleft()
            if isinstance(first, Load):
                self._load(first.card)
            else:
                self._submit(first)
        return True

    def _load(self, card: ModelCard) -> None:
        self._unload()
        try:
            self.chat = self.load(card)
            self.problem = ""
        except UserError as error:
            self.problem = str(error)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("%s could not be loaded", card.description)
            self.problem = f"{card.description} could not be loaded"
        slots = self.chat.engine.slots if self.chat else 0
        self.connection.send(Loaded(card, slots, self.problem or None))

    def _unload(self) -> None:
        if self.chat is not None:
            close = getattr(self.chat.engine.tool, "close", None)
            if close:
                close()
            self.chat = None
            release_memory()

    def _submit(self, order: Submit) -> None:
        problem = self.problem
        if self.chat is not None:
            try:
                request = self.chat.engine.submit(order.prompt, order.sampling)
                decoder = Detokenizer(self.chat.tokenizer, order.sampling.stop)
                self.writing[order.id] = _Writing(order.id, request, decoder)
                return
            except UserError as error:
                problem = str(error)
        self._fail([order.id], problem)

    def _cancel(self, number: int) -> None:
        self._orders = deque(order for order in self._orders if isinstance(order, Load) or order.id != number)
        writing = self.writing.pop(number, None)
        if writing and self.chat:
            self.chat.engine.cancel(writing.request)
            self._report([])

    def _step(self) -> None:
        assert self.chat is not None
        engine = self.chat.engine
        try:
            engine.step()
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("generation failed")
            for writing in self.writing.values():
                engine.cancel(writing.request)
            self._fail(list(self.writing), BROKE_DOWN)
            self.writing.clear()
            return
        special = set(self.chat.tokenizer.special_ids.values())
        pieces = [piece for writing in self.writing.values() if (piece := self._piece(writing, special))]
        for piece in pieces:
            if piece.finish_reason or piece.error:
                del self.writing[piece.id]
        if pieces:
            self._report(pieces)

    def _piece(self, writing: _Writing, special: set[int]) -> Piece | None:
        """What a reply has new; one that cannot be read fails alone."""
        try:
            return writing.piece(special)
        except Exception:
            log.exception("a reply cannot be read")
            assert self.chat is not None
            self.chat.engine.cancel(writing.request)
            return Piece(writing.id, [], [], 0, error=BROKE_DOWN)

    def _fail(self, numbers: list[int], problem: str) -> None:
        self._report([Piece(number, [], [], 0, error=problem) for number in numbers])

    def _report(self, pieces: list[Piece]) -> None:
        self.connection.send(Progress(pieces, self.chat.engine.stats() if self.chat else None))


def main(connection: Connection, load: Loader, gpu: int | None) -> None:
    """The process's work; `gpu` is the one it may see, of those that the server may."""
    # Ctrl-C goes to the whole group of processes; the server ends this one by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    # On a CPU, a thread less than there are cores: the server needs one, and threads that wait for one another at every
    # operation lose far more than a core when one of them does not run.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    EngineLoop(connection, load).run()
