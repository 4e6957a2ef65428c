"""Writing replies: many requests in one batch, joining and leaving at any step, with the python tool."""

import concurrent.futures
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.inference.detokenizer import Detokenizer
from nanochat.inference.drawn import Drawn
from nanochat.inference.kv_cache import KVCache, affordable_slots
from nanochat.inference.model_runner import ModelRunner, Span, on_device
from nanochat.inference.request import Completion, Request, TokenLogprob
from nanochat.inference.sampler import Sampler
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Chunk, Scheduler
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
"""Most prompt tokens in a step beside the tokens that are written, by device: some 40 ms of two cores at depth 4."""
TOOL_WAIT_SECONDS = 0.02
"""How long a step waits for tools when there is nothing else to do."""
SUPPRESSED_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|output_start|>", "<|output_end|>")
"""Tokens that are put into a conversation and never the model's own: it cannot play the user or make up a result."""


class Tool(Protocol):
    """What runs the text between <|python_start|> and <|python_end|>, from several threads at once."""

    def run(self, expression: str) -> str:
        """The result, or a text that says what went wrong; never raises."""


@dataclass(frozen=True)
class EngineStats:
    """How busy an engine is, and what it has done since it was made."""

    running: int
    """requests in the batch"""
    waiting: int
    """requests in the queue"""
    slots: int
    """requests that can be in the batch at once"""
    kv_bytes: int
    """memory of the KV cache"""
    prompt_tokens: int
    """tokens of all prompts that were taken in"""
    prefilled_tokens: int
    """of these, tokens that had to be computed"""
    generated_tokens: int
    """tokens written, a tool's output included"""
    prefix_hits: int
    """requests whose prompt began with what the KV cache held already"""


class Engine:
    """A model that writes. Not for use from several threads at once."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        tool: Tool | None = None,
        max_batch_size: int = 16,
        max_waiting: int | None = None,
        kv_cache_gb: float | None = None,
        half_weights: bool = False,
    ) -> None:
        """At most `max_batch_size` requests in the batch, fewer if the KV cache's budget does not hold their contexts.

        max_waiting: requests that may wait for a place in the batch; None: any number.
        kv_cache_gb: by default a quarter of the memory that is free. Raises UserError if it does not hold one context.
        half_weights: decode with weights rounded to fp16 on x86 CPUs that compute in fp32; no effect elsewhere.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.tool = tool
        self.half_weights = half_weights
        self.slots = affordable_slots(model, max_batch_size, kv_cache_gb)
        prefill_tokens = PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cpu"])
        self.scheduler = Scheduler(self.slots, prefill_tokens, max_waiting, self._copy_slot)
        self.reads_late = model.device.type == "cuda"
        """Whether drawn tokens are read one step later, so that the device never waits for the host"""
        self._end_ids = {tokenizer.bos_id, tokenizer.special("<|assistant_end|>")}
        self._python_start = tokenizer.special("<|python_start|>")
        self._python_end = tokenizer.special("<|python_end|>")
        self._never_drawn = torch.tensor([tokenizer.special(name) for name in SUPPRESSED_TOKENS], device=model.device)
        self._newest = torch.zeros(self.slots, dtype=torch.long, device=model.device)
        """the token drawn last in each slot"""
        self._runner: ModelRunner | None = None
        self._sampler: tuple[list[Request], Sampler] = ([], Sampler([], [], 0, self._never_drawn))
        self._drawn: Drawn | None = None
        self._tools = ThreadPoolExecutor(max_workers=4, thread_name_prefix="tool")
        self._generated_tokens = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt, in their order. Raises UserError if a prompt does not fit the context.

        Waits for tools at every step: who is in the batch with whom then never depends on how long a tool takes.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [self._request(prompt, own) for prompt, own in zip(prompts, samplings, strict=True)]
        self.scheduler.waiting.extend(requests)
        while self.busy:
            if tool_calls := self._tool_calls():
                concurrent.futures.wait(tool_calls)
            self.step()
        return [request.completion for request in requests]

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        """Queue a prompt; `step` writes on.

        Raises UserError if it leaves no room for an answer in the context, QueueFullError if the queue is full.
        """
        request = self._request(prompt, sampling)
        self.scheduler.submit(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether there is something to write: call `step`."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def stats(self) -> EngineStats:
        """How busy the engine is, and what it has done."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=self.slots,
            kv_bytes=self._runner.cache.nbytes if self._runner else 0,
            prompt_tokens=scheduler.prompt_tokens,
            prefilled_tokens=scheduler.prompt_tokens - scheduler.prefix_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=scheduler.prefix_hits,
        )

    def cancel(self, request: Request) -> None:
        """Stop writing a reply; it leaves the batch at once."""
        self.scheduler.release(request)

    def reset(self) -> None:
        """Free the KV cache and the copies of the weights; the next step makes them again.

        To be called when the model's weights have changed, or its memory is wanted. Only while not `busy`.
        """
        self._runner = self._drawn = None
        self.scheduler.reset()

    @torch.inference_mode()
    def step(self) -> None:
        """Every running request gets on by one token, or by a stretch of its prompt; waiting ones join the batch."""
        self._take_tool_outputs()
        if self._runner is None:
            cache = KVCache(self.model, self.slots)
            self._runner = ModelRunner(self.model, cache, self.tokenizer.vocab_size, self.half_weights)
        chunks = self.scheduler.schedule()
        earlier, self._drawn = self._drawn, self._launch(self._runner, chunks) if chunks else None
        if earlier:
            self._read(earlier)
        if self._drawn and not self.reads_late:
            self._read(self._drawn)
            self._drawn = None
        if not chunks and not earlier:
            concurrent.futures.wait(self._tool_calls(), TOOL_WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)

    def _request(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        context = self.model.config.sequence_len
        if not 0 < len(prompt) < context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context is {context}: make it shorter"
            )
        decoder = Detokenizer(self.tokenizer, sampling.stop) if sampling.stop else None
        return Request(prompt, sampling, context, decoder)

    def _copy_slot(self, source: int, target: int, length: int) -> None:
        if length:
            assert self._runner is not None
            self._runner.cache.copy(source, target, length)

    def _launch(self, runner: ModelRunner, chunks: list[Chunk]) -> Drawn | None:
        """Have the device read the chunks, and draw a token for each request that has no more to read."""
        hidden = runner.hidden(self._tokens(chunks), spans_of(chunks))
        last_rows = list(itertools.accumulate(chunk.count for chunk in chunks))
        drawing = [(chunk.request, row - 1) for chunk, row in zip(chunks, last_rows, strict=True) if chunk.draws]
        joined = any(chunk.count > 1 for chunk in chunks)
        for chunk in chunks:
            chunk.request.computed += chunk.count
        if not drawing:
            return None
        requests = [request for request, _ in drawing]
        if len(requests) < last_rows[-1]:
            hidden = hidden[on_device([row for _, row in drawing], hidden.device)]
        sampler = self._sampler_for(requests, joined)
        logits = runner.logits(hidden)
        tokens = sampler.draw(logits, [request.next_draw() for request in requests])
        places = [len(request.tokens) + request.in_flight for request in requests]
        for request in requests:
            request.in_flight += 1
        if self.reads_late:
            self._newest.index_copy_(0, self._slots(requests), tokens)
        results = (tokens, *sampler.logprobs(logits, tokens)) if sampler.logprob_rows else (tokens,)
        return Drawn.sent_to_host(requests, places, results, sampler.logprob_rows)

    def _tokens(self, chunks: list[Chunk]) -> Tensor:
        """The chunks' tokens one after the other; those that the host does not know yet come from the device."""
        tokens: list[int] = []
        unknown_rows: list[int] = []
        in_flight: list[Request] = []
        for chunk in chunks:
            tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.count]
            if chunk.start + chunk.count > len(chunk.request.tokens):
                unknown_rows.append(len(tokens))
                in_flight.append(chunk.request)
                tokens.append(0)
        sent = on_device(tokens, self.model.device)
        if in_flight:
            sent.index_copy_(0, on_device(unknown_rows, sent.device), self._newest[self._slots(in_flight)])
        return sent

    def _slots(self, requests: list[Request]) -> Tensor:
        return on_device([request.slot for request in requests if request.slot is not None], self.model.device)

    def _sampler_for(self, requests: list[Request], joined: bool) -> Sampler:
        """The sampler of a batch: that of the step before if the batch is the same, and has been given no tokens."""
        batch, sampler = self._sampler
        if joined or batch != requests:
            held = [request.tokens for request in requests]
            samplings = [request.sampling for request in requests]
            sampler = Sampler(samplings, held, self.tokenizer.vocab_size, self._never_drawn)
            in_flight = [row for row, request in enumerate(requests) if request.in_flight]
            if sampler.penalised and in_flight:
                sampler.mark(in_flight, self._newest[self._slots([requests[row] for row in in_flight])])
            self._sampler = (requests, sampler)
        return sampler

    def _read(self, drawn: Drawn) -> None:
        """Append what was drawn to its requests, those excepted that have ended or been given other tokens since."""
        logprobs = drawn.logprobs()
        for row, (request, place, token) in enumerate(zip(drawn.requests, drawn.places, drawn.tokens(), strict=True)):
            if request.slot is None or request.tool_call or place != len(request.tokens):
                continue
            request.in_flight -= 1
            self._append(request, token, sampled=True, logprob=logprobs.get(row))
            if request.completion.finish_reason:
                self.scheduler.release(request)

    def _append(self, request: Request, token: int, *, sampled: bool, logprob: TokenLogprob | None = None) -> None:
        """Add a token to a reply: see whether that ends it, and call the tool at the end of a call."""
        completion = request.completion
        request.tokens.append(token)
        completion.tokens.append(token)
        completion.sampled.append(sampled)
        self._generated_tokens += 1
        if request.sampling.logprobs is not None:
            completion.logprobs.append(logprob)
        if request.decoder:
            request.decoder.feed(token)
        if token in self._end_ids or (request.decoder and request.decoder.stopped):
            completion.finish_reason = "stop"
        elif len(request.tokens) >= request.limit:
            completion.finish_reason = "length"
        elif token == self._python_start:
            request.code = []
        elif token == self._python_end and request.code is not None:
            self._call_tool(request, self.tokenizer.decode(request.code))
            request.code = None
        elif request.code is not None:
            request.code.append(token)

    def _call_tool(self, request: Request, code: str) -> None:
        if self.tool is not None:
            request.tool_call = self._tools.submit(self.tool.run, code)
            request.in_flight = 0  # a token drawn meanwhile is not wanted: the tool's output comes next

    def _tool_calls(self) -> list[Future[str]]:
        return [request.tool_call for request in self.scheduler.running.values() if request.tool_call]

    def _take_tool_outputs(self) -> None:
        """Continue the requests whose tools have finished with what these said."""
        for request in list(self.scheduler.running.values()):
            if request.tool_call is None or not request.tool_call.done():
                continue
            output = self.tokenizer.encode(request.tool_call.result())
            request.tool_call = None
            opening, closing = (self.tokenizer.special(name) for name in ("<|output_start|>", "<|output_end|>"))
            for token in (opening, *output, closing):
                self._append(request, token, sampled=False)
                if request.completion.finish_reason:
                    self.scheduler.release(request)
                    break


def spans_of(chunks: Sequence[Chunk]) -> list[Span]:
    """The chunks as the model runner takes them: single tokens in neighbouring slots together."""
    spans: list[Span] = []
    first_row = 0
    for chunk in chunks:
        slot = chunk.request.slot
        assert slot is not None
        last = spans[-1] if spans else None
        if last and chunk.count == last.count == 1 and slot == last.first_slot + len(last.starts):
            spans[-1] = Span(last.first_row, last.first_slot, (*last.starts, chunk.start), 1)
        else:
            spans.append(Span(first_row, slot, (chunk.start,), chunk.count))
        first_row += chunk.count
    return spans
