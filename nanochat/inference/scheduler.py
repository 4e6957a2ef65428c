"""Continuous batching: decides which requests run and what each step computes.

Requests wait in a first-come, first-served queue for a slot of the KV cache. In each step, every running request whose
only uncomputed token is its newest decodes one token. Longer stretches of uncomputed tokens, such as prompts, are
prefilled in chunks in the same step, so that decoding never stalls for longer than one chunk.

A slot keeps its tokens when its request leaves. A prompt with the same prefix reuses them, from a free slot or from one
in use, so that several samples of one prompt prefill it once.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from nanochat.inference.detokenizer import Delta, Detokenizer, TokenLogprob
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tokenizer import Tokenizer

MIN_PREFIX = 8  # shorter shared prefixes (all chats share two tokens) are not worth copying or waiting for


@dataclass
class Completion:
    """Tokens generated after a prompt."""

    tokens: list[int] = field(default_factory=list)  # includes the closing <|assistant_end|> or <|bos|> and stop string
    sampled: list[bool] = field(default_factory=list)  # False for a tool's output
    finish_reason: Literal["stop", "length"] | None = None  # None while running
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # if needed, of all but the first token
    logprobs: list[TokenLogprob | None] = field(default_factory=list)  # per token if requested, None for tool output


class Request:
    """A prompt, the tokens generated so far, and the state of both in the KV cache."""

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, context: int, tokenizer: Tokenizer) -> None:
        """context: maximum length of prompt and completion together."""
        self.sampling = sampling
        self.constraint = sampling.constraint(tokenizer) if sampling.constraint else None
        self.completion = Completion()
        self.prompt_length = len(prompt)
        # With max_tokens of 0 a token is sampled too, but not added.
        self.max_length = min(len(prompt) + sampling.max_tokens, context) if sampling.max_tokens else len(prompt) + 1
        self.tokens = list(prompt)  # prompt and completion
        self.num_computed = 0  # tokens whose keys and values are in the cache, or are queued on the device
        self.num_in_flight = 0  # 1 if a token has been sampled on the device that the host has not read yet
        self.slot: int | None = None  # slot in the KV cache while running
        self.tool_code: list[int] | None = None  # tokens since <|python_start|>
        self.tool_call: Future[str] | None = None  # while set, nothing is sampled: the tool's output comes next
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, sampling.stop, sampling.stop_token_ids)
        self._num_detokenized = 0
        self._deltas: list[Delta] = []  # not returned yet

    @property
    def is_ready(self) -> bool:
        """False while a tool runs, and when the token in flight is the last allowed or determines the next mask."""
        if self.constraint and self.num_in_flight:
            return False
        return self.tool_call is None and len(self.tokens) + self.num_in_flight < self.max_length

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has not read yet; the next token is sampled once this is 0."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def next_index(self) -> int:
        """Index of the next token in the completion."""
        return len(self.tokens) + self.num_in_flight - self.prompt_length

    def next_uniform(self) -> float:
        """Return the random number in [0, 1) for the next token, a function of the seed and the token's index."""
        return self.sampling.uniform(self.next_index)

    def found_stop_string(self) -> str | None:
        """Return the stop string that ended the text, if any."""
        if not self.sampling.stop:
            return None
        self._detokenize()
        return self._detokenizer.stopped_by

    def new_deltas(self, *, end: bool) -> list[Delta]:
        """Return the text generated since the last call; with `end`, also the text that the detokenizer holds back."""
        self._detokenize()
        if end and (rest := self._detokenizer.flush()):
            self._deltas.append(rest)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _detokenize(self) -> None:
        tokens, logprobs = self.completion.tokens, self.completion.logprobs
        if (
            self.sampling.echo_from is not None
            and self._num_detokenized == 0
            and (tokens or self.completion.finish_reason)
        ):
            self._deltas.append(self._echo(self.sampling.echo_from))
        for index in range(self._num_detokenized, len(tokens)):
            if delta := self._detokenizer.feed(tokens[index], logprobs[index] if logprobs else None):
                self._deltas.append(delta)
        self._num_detokenized = len(tokens)

    def _echo(self, start: int) -> Delta:
        """Return the prompt as the first piece of the text."""
        prompt, logprobs = self.tokens[start : self.prompt_length], list[TokenLogprob]()
        if self.sampling.needs_prompt_logprobs and prompt:
            logprobs = [TokenLogprob(prompt[0], None, ()), *self.completion.prompt_logprobs[start:]]
        special_ids = set(self._tokenizer.special_ids.values())
        return Delta("text", self._tokenizer.decode([token for token in prompt if token not in special_ids]), logprobs)


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
        # The last token is always computed, because its logits are needed; for the prompt's logprobs, all of them are.
        prompt = [] if request.sampling.needs_prompt_logprobs else request.tokens[:-1]
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
