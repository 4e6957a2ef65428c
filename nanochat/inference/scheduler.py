"""Who is in the batch, and what is computed next.

Requests wait in a queue, first come first served, for a slot of the KV cache. In every step each running request whose
tokens have all been read but the newest reads that one and draws the next (decode); long stretches of unread tokens,
such as prompts, are read in chunks beside that (prefill), so that nobody who writes waits longer than for one chunk.

A slot keeps what it holds when its request leaves. A prompt that begins alike takes over that beginning, from a free
slot or from one in use; the samples of one prompt thus read it once.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.inference.kv_cache import Slot
from nanochat.inference.request import QueueFullError, Request

LEAST_PREFIX = 8
"""A shorter common beginning (every chat has the first two tokens) is not worth a copy, nor waiting for."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that a request's model reads in a step: `count` from position `start` on."""

    request: Request
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether nothing is left unread after it, so that the next token is drawn."""
        return self.request.uncomputed == self.count


class Scheduler:
    """The queue, the running requests and their slots."""

    def __init__(
        self, slots: int, prefill_tokens: int, max_waiting: int | None, copy: Callable[[int, int, int], None]
    ) -> None:
        """`prefill_tokens`: most of them in a step; `copy(source, target, length)` copies the beginning of a slot."""
        self.prefill_tokens = prefill_tokens
        self.max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        """by slot"""
        self.slots = [Slot(index) for index in range(slots)]
        self.prompt_tokens = self.prefix_tokens = self.prefix_hits = 0
        self._copy = copy
        self._uses = itertools.count(1)
        self._mean_stay = 1.0
        """seconds in the batch, of late"""

    def submit(self, request: Request) -> None:
        """Put a request in the queue. Raises QueueFullError if that is full."""
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise QueueFullError(len(self.waiting), retry_after=max(1.0, self._mean_stay / len(self.slots)))
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """What to compute in this step: all that can be decoded, by slot, then prefill, the first come first."""
        self._admit()
        ready = [request for request in self.running.values() if request.is_ready]
        decode = [Chunk(request, request.computed, 1) for request in ready if request.uncomputed == 1]
        decode.sort(key=lambda chunk: chunk.request.slot or 0)
        prefill, left = [], self.prefill_tokens
        for request in ready:
            if request.uncomputed > 1 and left:
                count = min(request.uncomputed, left)
                left -= count
                prefill.append(Chunk(request, request.computed, count))
        return decode + prefill

    def release(self, request: Request) -> None:
        """Take a request out of the batch or the queue; what it has read stays in its slot until that is needed."""
        if request.slot is None:
            self.waiting = deque(other for other in self.waiting if other is not request)
            return
        slot = self.slots[request.slot]
        slot.tokens, slot.last_used = request.tokens[: request.computed], next(self._uses)
        del self.running[slot.index]
        request.slot = None
        self._mean_stay += 0.1 * (time.monotonic() - request.joined - self._mean_stay)

    def reset(self) -> None:
        """What the slots hold is good no longer."""
        for slot in self.slots:
            slot.tokens = []

    def _admit(self) -> None:
        """Give waiting requests free slots."""
        still_waiting: deque[Request] = deque()
        while self.waiting and len(self.running) < len(self.slots):
            request = self.waiting.popleft()
            source, length, coming = self._longest_prefix(request)
            if coming >= length + LEAST_PREFIX:
                still_waiting.append(request)  # another is about to read the same beginning: copy it then
            else:
                self._place(request, source, length)
        self.waiting.extendleft(reversed(still_waiting))

    def _longest_prefix(self, request: Request) -> tuple[Slot, int, int]:
        """The slot that holds the longest beginning of the prompt, its length, and the longest one being read.

        The prompt's last token is always computed: its logits are needed.
        """
        prompt = request.tokens[:-1]
        best, length, coming = self.slots[0], 0, 0
        for slot in self.slots:
            user = self.running.get(slot.index)
            common = common_prefix(prompt, user.tokens if user else slot.tokens)
            coming = max(coming, common)
            held = min(common, user.computed) if user else common
            if held > length:
                best, length = slot, held
        return best, length, coming

    def _place(self, request: Request, source: Slot, length: int) -> None:
        """Put a request in the batch: in the slot that holds its beginning, else in the one unused for longest.

        A slot that holds more than twice what is alike is copied from, since its own conversation may go on.
        """
        in_place = source.index not in self.running and 2 * length >= len(source.tokens)
        if in_place:
            target = source
        else:
            free = [slot for slot in self.slots if slot.index not in self.running]
            target = min(free, key=lambda slot: (slot.last_used, slot.index))
            if target is not source:
                length = length if length >= LEAST_PREFIX else 0
                self._copy(source.index, target.index, length)
        request.slot, request.computed, request.joined = target.index, length, time.monotonic()
        self.running[target.index] = request
        self.prompt_tokens += request.prompt_length
        self.prefix_tokens += length
        self.prefix_hits += length >= LEAST_PREFIX


def common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens that two lists have in common at their beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
