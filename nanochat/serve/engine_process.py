"""The engine process: reads requests from a socket, runs the engine and sends back its outputs.

A process and not a thread, because decoding with a small model is mostly Python: in a shared process, the event loop
and the model would wait for each other's GIL.
"""

import contextlib
import logging
import math
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import Delta
from nanochat.inference.engine import EngineStats
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Request
from nanochat.runtime import release_memory
from nanochat.sandbox.calculator import Calculator
from nanochat.serve.logs import configure_logging
from nanochat.serve.model_registry import ModelCard

log = logging.getLogger(__name__)
ModelLoader = Callable[[ModelCard], ChatModel]
Prompts = Sequence[tuple[list[int], SamplingParams]]
GENERATION_FAILED = "the model failed to generate a reply"
HEARTBEAT_SECONDS = 1.0
SEND_SECONDS = 0.01
"""Time between messages with new text, except the first and the last of a reply: a small model generates several tokens
in that time, and sending and handling each one alone would slow it down."""
MAX_STEP_SECONDS = 300  # a step that takes longer hangs, most likely in a GPU driver: the heartbeat stops


class LoadModel(NamedTuple):
    card: ModelCard  # replaces the current model once all earlier requests are finished


class AddRequest(NamedTuple):
    id: int
    prompt: list[int]
    sampling: SamplingParams


class AbortRequest(NamedTuple):
    id: int


class ModelLoaded(NamedTuple):
    card: ModelCard
    slots: int
    error: str | None  # the reason why it could not be loaded


class RequestOutput(NamedTuple):
    """New output of one request since the last one."""

    id: int
    deltas: Sequence[Delta] = ()
    num_tokens: int = 0  # generated so far
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str | None = None  # that ended the reply
    error: str | None = None  # message for the client; the request has failed


class StepOutputs(NamedTuple):
    """Outputs of all requests in one step; without any, a heartbeat, sent every HEARTBEAT_SECONDS."""

    outputs: list[RequestOutput]
    stats: EngineStats | None = None  # None without a model, and in a heartbeat


EngineRequest = LoadModel | AddRequest | AbortRequest
EngineEvent = ModelLoaded | StepOutputs


def pack(message: EngineRequest | EngineEvent) -> bytes:
    """Return a message as sent through the socket: 4 bytes with its length, then its pickle."""
    data = pickle.dumps(message)
    return len(data).to_bytes(4, "big") + data


class EngineLoop:
    """Handles requests from the socket and steps the engine while there is work."""

    def __init__(self, connection: socket.socket, load: ModelLoader) -> None:
        self.connection = connection
        self.load = load
        self.chat: ChatModel | None = None
        self.load_error = ""
        self.active: dict[int, Request] = {}
        self._received: queue.SimpleQueue[EngineRequest | None] = queue.SimpleQueue()
        self._pending: deque[LoadModel | AddRequest] = deque()
        self._send_lock = threading.Lock()
        self._step_start = math.inf  # of the step in progress
        self._last_sent = -math.inf
        self._stopped = threading.Event()

    def run(self) -> None:
        """Run until the socket is closed or the GPU fails, which requires a new process."""
        for target in (self._receive, self._send_heartbeats):
            threading.Thread(target=target, daemon=True).start()
        with self.connection:
            try:
                while self._handle_requests():
                    if self.active:
                        self._step()
            except OSError:  # the server is gone
                pass
            except torch.AcceleratorError:
                log.exception("the GPU failed")
            finally:
                self._unload()
                self._stopped.set()
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)  # ends `_receive`

    def _receive(self) -> None:
        # In a thread, because the main one is busy during a step.
        with self.connection.makefile("rb") as stream, contextlib.suppress(OSError, pickle.UnpicklingError):
            while header := stream.read(4):
                self._received.put(pickle.loads(stream.read(int.from_bytes(header, "big"))))
        self._received.put(None)

    def _send_heartbeats(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stopped.wait(HEARTBEAT_SECONDS):
                if time.monotonic() - self._step_start < MAX_STEP_SECONDS:
                    self._send(StepOutputs([]))

    def _send(self, event: EngineEvent) -> None:
        with self._send_lock:
            self.connection.sendall(pack(event))

    def _handle_requests(self) -> bool:
        """Handle received requests, waiting for one if the engine is idle. Return False when the socket is closed."""
        is_idle = not self.active and not self._pending
        while is_idle or not self._received.empty():
            request, is_idle = self._received.get(), False
            if request is None:
                return False
            if isinstance(request, AbortRequest):
                self._abort(request.id)
            else:
                self._pending.append(request)
        while self._pending and not (isinstance(self._pending[0], LoadModel) and self.active):
            first = self._pending.popleft()
            if isinstance(first, LoadModel):
                self._load(first.card)
            else:
                self._add(first)
        return True

    def _load(self, card: ModelCard) -> None:
        self._unload()
        try:
            self.chat = self.load(card)
            self.load_error = ""
        except UserError as error:
            self.load_error = str(error)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("cannot load %s", card.description)
            self.load_error = f"cannot load {card.description}"
        slots = self.chat.engine.slots if self.chat else 0
        self._send(ModelLoaded(card, slots, self.load_error or None))

    def _unload(self) -> None:
        if self.chat is not None:
            if isinstance(self.chat.engine.tool, Calculator):
                self.chat.engine.tool.close()
            self.chat = None
            release_memory()

    def _add(self, request: AddRequest) -> None:
        error = self.load_error
        if self.chat is not None:
            try:
                self.active[request.id] = self.chat.engine.submit(request.prompt, request.sampling)
                return
            except UserError as refusal:
                error = str(refusal)
        self._send_outputs([RequestOutput(request.id, error=error)])

    def _abort(self, id: int) -> None:
        self._pending = deque(other for other in self._pending if isinstance(other, LoadModel) or other.id != id)
        request = self.active.pop(id, None)
        if request and self.chat:
            self.chat.engine.cancel(request)
            self._send_outputs([])

    def _step(self) -> None:
        assert self.chat is not None
        engine = self.chat.engine
        self._step_start = time.monotonic()
        try:
            engine.step()
            outputs = self._new_outputs()
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("generation failed")
            for request in self.active.values():
                engine.cancel(request)
            self._send_outputs([RequestOutput(id, error=GENERATION_FAILED) for id in self.active])
            self.active.clear()
            return
        finally:
            self._step_start = math.inf
        for output in outputs:
            if output.finish_reason:
                del self.active[output.id]
        if outputs:
            self._send_outputs(outputs)

    def _new_outputs(self) -> list[RequestOutput]:
        """Return what to send now: first and last text of replies, and every SEND_SECONDS the text of all."""
        now = time.monotonic()
        is_due = now - self._last_sent >= SEND_SECONDS
        if is_due:
            self._last_sent = now
        outputs = (
            self._output(id, request)
            for id, request in self.active.items()
            if is_due or request.completion.finish_reason or len(request.completion.tokens) == 1
        )
        return [output for output in outputs if output]

    def _output(self, id: int, request: Request) -> RequestOutput | None:
        """Return the output since the last call, None if there is none."""
        completion = request.completion
        deltas = request.new_deltas(end=bool(completion.finish_reason))
        if not deltas and not completion.finish_reason:
            return None
        stop_string = request.found_stop_string()
        return RequestOutput(id, deltas, len(completion.tokens), completion.finish_reason, stop_string)

    def _send_outputs(self, outputs: list[RequestOutput]) -> None:
        self._send(StepOutputs(outputs, self.chat.engine.stats() if self.chat else None))


def main(connection: socket.socket, load: ModelLoader, gpu: int | None) -> None:
    """Entry point of the process. gpu: the only GPU it uses, as an index into the server's visible GPUs."""
    configure_logging()
    # Ctrl-C and systemd signal all processes of the server; it stops this one by closing the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    # On a CPU, leave one core to the server: threads that synchronize after every operation lose far more than one
    # core's speed when one of them is not scheduled.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    EngineLoop(connection, load).run()
