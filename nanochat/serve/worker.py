"""One thread that owns the model. Requests wait for it in a bounded line; the event loop never does.

Generation keeps a core or the GPU busy for seconds: inside the event loop it would hold up every other
connection, /health among them.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from nanochat.data.conversations import Message
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.reply import Delta
from nanochat.inference.request import Completion
from nanochat.inference.sampling import Sampling

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The line is full: try again later."""


class GenerationError(Exception):
    """The model broke down over a reply; what happened is in the log."""


class Reply:
    """One answer being written: iterate over its deltas, or `cancel()` it when nobody listens any more.

    Iteration raises UserError where the conversation itself is at fault (longer than the context, say)
    and GenerationError where the model broke down.
    """

    def __init__(self, messages: list[Message], sampling: Sampling) -> None:
        self.messages = messages
        self.sampling = sampling
        self.stop = threading.Event()
        self.completion: Completion | None = None
        """what was written, once the deltas have ended"""
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Ask the model to stop, which it does within one token. From any thread, as often as one likes."""
        self.stop.set()

    def deliver(self, item: Delta | Exception | None) -> None:
        """Hand on a delta, an error, or None for the end. Called from the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)
        except RuntimeError:  # the event loop has closed: nobody is left to read
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while (item := await self._arrived.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class ModelWorker:
    """Answers conversations one after another, in the order they came."""

    def __init__(self, chat_model: ChatModel, max_waiting: int = 16) -> None:
        """`max_waiting`: requests that may wait behind the one being answered."""
        self.chat_model = chat_model
        self.max_waiting = max_waiting
        self._line: deque[Reply] = deque()
        self._changed = threading.Condition()
        self._current: Reply | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        with self._changed:
            return sum(not reply.stop.is_set() for reply in self._line)

    @property
    def running(self) -> int:
        """Requests being answered now."""
        return int(self._current is not None)

    def submit(self, messages: list[Message], sampling: Sampling) -> Reply:
        """Queue a conversation for an answer; call it in the event loop. Raises QueueFullError if the line is full."""
        reply = Reply(messages, sampling)
        with self._changed:
            self._line = deque(other for other in self._line if not other.stop.is_set())
            if self._closed or len(self._line) >= self.max_waiting + (self._current is None):
                raise QueueFullError
            self._line.append(reply)
            self._changed.notify()
        return reply

    def close(self) -> None:
        """Stop the answer being written, drop those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            for reply in [*self._line, *filter(None, [self._current])]:
                reply.cancel()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                self._current = self._line.popleft()
            self._answer(self._current)

    def _deltas(self, reply: Reply) -> Iterator[Delta]:
        reply.completion = yield from self.chat_model.stream(reply.messages, reply.sampling, reply.stop)

    def _answer(self, reply: Reply) -> None:
        try:
            if not reply.stop.is_set():
                for delta in self._deltas(reply):
                    reply.deliver(delta)
            reply.deliver(None)
        except UserError as error:
            reply.deliver(error)
        except Exception:
            log.exception("generation failed")
            reply.deliver(GenerationError("the model failed to answer"))
