"""Continuous batching: which requests run, and what is computed in each step.

Requests wait in a first-come, first-served queue for a slot of the KV cache. In each step, every running request whose
only uncomputed token is its newest decodes one token. Longer stretches of uncomputed tokens, such as prompts, are
prefilled in chunks in the same step, so that decoding never stalls for longer than one chunk.

A slot keeps its tokens when its request leaves. A prompt with the same prefix reuses them, from a free slot or from one
in use, so that several samples of one prompt prefill it once.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nanochat.inference.request import Request

MIN_PREFIX = 8
"""Shorter shared prefixes (all chats share two tokens) are not worth copying or waiting for."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of a request that the model reads in one step: `count` tokens from position `start`."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """True if no uncomputed tokens are left after this chunk, so that the next token is sampled."""
        return self.request.num_uncomputed == self.count


@dataclass
class Slot:
    """A slot of the KV cache and the tokens it holds, for prefix reuse."""

    index: int
    tokens: list[int] = field(default_factory=list)  # while no request uses the slot
    last_used: int = 0  # increasing counter


class Scheduler:
    """The queue, the running requests and their slots."""

    def __init__(self, slots: int, prefill_tokens: int, copy: Callable[[int, int, int], None]) -> None:
        """prefill_tokens: maximum per step. copy: called as copy(source slot, target slot, length)."""
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by slot
        self.slots = [Slot(index) for index in range(slots)]
        self.prompt_tokens = self.prefix_tokens = self.prefix_hits = 0
        self._copy = copy
        self._uses = itertools.count(1)

    def schedule(self) -> list[Chunk]:
        """Return the chunks of the next step: all decodes by slot, then prefills in order of arrival."""
        self._admit()
        ready = [request for request in self.running.values() if request.is_ready]
        decode = [Chunk(request, request.num_computed, 1) for request in ready if request.num_uncomputed == 1]
        decode.sort(key=lambda chunk: chunk.request.slot or 0)
        prefill, budget = [], self.prefill_tokens
        for request in ready:
            if request.num_uncomputed > 1 and budget:
                count = min(request.num_uncomputed, budget)
                budget -= count
                prefill.append(Chunk(request, request.num_computed, count))
        return decode + prefill

    def release(self, request: Request) -> None:
        """Remove a request from the batch or the queue. Its slot keeps its tokens until it is needed."""
        if request.slot is None:
            self.waiting = deque(other for other in self.waiting if other is not request)
            return
        slot = self.slots[request.slot]
        slot.tokens, slot.last_used = request.tokens[: request.num_computed], next(self._uses)
        del self.running[slot.index]
        request.slot = None

    def reset(self) -> None:
        """Invalidate the tokens in all slots."""
        for slot in self.slots:
            slot.tokens = []

    def _admit(self) -> None:
        """Assign free slots to waiting requests."""
        still_waiting: deque[Request] = deque()
        while self.waiting and len(self.running) < len(self.slots):
            request = self.waiting.popleft()
            source, length, pending = self._longest_prefix(request)
            if pending >= length + MIN_PREFIX:
                still_waiting.append(request)  # another request is computing a longer prefix: copy that once done
            else:
                self._assign_slot(request, source, length)
        self.waiting.extendleft(reversed(still_waiting))

    def _longest_prefix(self, request: Request) -> tuple[Slot, int, int]:
        """Return the slot with the longest computed prefix, its length, and the longest length being computed."""
        prompt = request.tokens[:-1]  # the last token is always computed: its logits are needed
        best, length, pending = self.slots[0], 0, 0
        for slot in self.slots:
            user = self.running.get(slot.index)
            common = common_prefix(prompt, user.tokens if user else slot.tokens)
            pending = max(pending, common)
            computed = min(common, user.num_computed) if user else common
            if computed > length:
                best, length = slot, computed
        return best, length, pending

    def _assign_slot(self, request: Request, source: Slot, length: int) -> None:
        """Start a request in the slot that holds its prefix, or else in the least recently used one.

        A slot that holds more than twice the prefix is copied instead, because its own conversation may continue.
        """
        in_place = source.index not in self.running and 2 * length >= len(source.tokens)
        if in_place:
            target = source
        else:
            free = [slot for slot in self.slots if slot.index not in self.running]
            target = min(free, key=lambda slot: (slot.last_used, slot.index))
            if target is not source:
                length = length if length >= MIN_PREFIX else 0
                self._copy(source.index, target.index, length)
        request.slot, request.num_computed = target.index, length
        self.running[target.index] = request
        self.prompt_tokens += request.prompt_length
        self.prefix_tokens += length
        self.prefix_hits += length >= MIN_PREFIX


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
