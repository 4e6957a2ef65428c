"""The inference engine: continuous batching with a KV cache, prefix reuse and the Python tool."""

import concurrent.futures
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.inference.detokenizer import TokenLogprob
from nanochat.inference.model_runner import ModelRunner, Span, num_slots, on_device
from nanochat.inference.sampler import Sampler, SamplerOutput, token_logprob
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Chunk, Completion, Request, Scheduler
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}  # maximum prompt tokens per step: about 40 ms on two cores at depth 4
LOGPROB_ROWS = 512  # logits of the prompt computed at once, for its logprobs
TOOL_WAIT_SECONDS = 0.02  # time that a step waits for tools when there is nothing else to do
SUPPRESSED_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|output_start|>", "<|output_end|>")
"""Never sampled: the model cannot write the user's turn or invent a tool's output."""


class Tool(Protocol):
    """Runs the code between <|python_start|> and <|python_end|>. Called from several threads."""

    def run(self, expression: str) -> str:
        """Return the result or an error message; never raises."""


@dataclass(frozen=True)
class EngineStats:
    """Size of the KV cache, and totals since the engine was created."""

    kv_bytes: int
    prompt_tokens: int
    prefilled_tokens: int  # prompt tokens that were computed, not reused
    generated_tokens: int  # including tool output
    prefix_hits: int  # requests that reused a prefix


class Engine:
    """Generates completions. Not thread-safe."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        tool: Tool | None = None,
        max_batch_size: int = 16,
        kv_cache_gb: float | None = None,
    ) -> None:
        """Create an engine; the KV cache is allocated in the first step.

        max_batch_size: requests per batch, fewer if the KV cache does not hold as many sequences.
        kv_cache_gb: default: a quarter of the free memory. Raises UserError if it does not hold one sequence.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.tool = tool
        self.slots = num_slots(model, max_batch_size, kv_cache_gb)
        self.scheduler = Scheduler(self.slots, PREFILL_TOKENS[model.device.type], self._copy_slot)
        self.is_async = model.device.type == "cuda"  # tokens are read one step late, so that the GPU never waits
        self._end_ids = {tokenizer.bos_id, tokenizer.special("<|assistant_end|>")}
        self._python_start = tokenizer.special("<|python_start|>")
        self._python_end = tokenizer.special("<|python_end|>")
        self._suppressed = torch.tensor([tokenizer.special(name) for name in SUPPRESSED_TOKENS], device=model.device)
        self._last_tokens = torch.zeros(self.slots, dtype=torch.long, device=model.device)  # sampled last, by slot
        self._runner: ModelRunner | None = None
        self._sampler: tuple[list[Request], Sampler] = ([], Sampler([], 0, self._suppressed))
        self._unread: SamplerOutput | None = None
        self._tool_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="tool")
        self._generated_tokens = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete all prompts and return the completions in the same order. Raises UserError if a prompt is too long.

        Every step waits for tools, so that the composition of batches does not depend on their timing.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [self._request(prompt, own) for prompt, own in zip(prompts, samplings, strict=True)]
        self.scheduler.waiting.extend(requests)
        while self.busy:
            concurrent.futures.wait(self._tool_calls())
            self.step()
        return [request.completion for request in requests]

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        """Queue a prompt. Raises UserError if it fills the whole context."""
        request = self._request(prompt, sampling)
        self.scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        self.scheduler.release(request)

    @property
    def busy(self) -> bool:
        """True while requests are running or waiting, so `step` must be called."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            kv_bytes=self._runner.cache.nbytes if self._runner else 0,
            prompt_tokens=scheduler.prompt_tokens,
            prefilled_tokens=scheduler.prompt_tokens - scheduler.prefix_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=scheduler.prefix_hits,
        )

    def reset(self) -> None:
        """Free the KV cache and the copies of the weights; the next step creates them again.

        Call it after changing the model's weights, or to free memory, but never while `busy`.
        """
        self._runner = self._unread = None
        for slot in self.scheduler.slots:
            slot.tokens = []

    @torch.inference_mode()
    def step(self) -> None:
        """Admit waiting requests, then advance each running one by one token or by one chunk of its prompt."""
        self._append_tool_outputs()
        if self._runner is None:
            self._runner = ModelRunner(self.model, self.slots, self.tokenizer.vocab_size)
        chunks = self.scheduler.schedule()
        previous, self._unread = self._unread, self._launch(self._runner, chunks) if chunks else None
        if previous:
            self._process(previous)
        if self._unread and not self.is_async:
            self._process(self._unread)
            self._unread = None
        if not chunks and not previous:
            concurrent.futures.wait(self._tool_calls(), TOOL_WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)

    def _request(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        max_length = self.model.config.sequence_len
        if not 0 < len(prompt) < max_length + (sampling.max_tokens == 0):
            raise UserError(f"the prompt has {len(prompt)} tokens, but the model's context is {max_length}: shorten it")
        return Request(prompt, sampling, max_length, self.tokenizer)

    def _copy_slot(self, source: int, target: int, length: int) -> None:
        if length:
            assert self._runner is not None
            self._runner.copy_slot(source, target, length)

    def _launch(self, runner: ModelRunner, chunks: list[Chunk]) -> SamplerOutput | None:
        """Run the model on the chunks and sample a token for each request with no uncomputed tokens left."""
        inputs, spans = self._input_tokens(chunks), spans_of(chunks)
        decodes = runner.use_graphs and all(
            chunk.count == 1 and chunk.samples and chunk.start >= chunk.request.prompt_length for chunk in chunks
        )
        output = runner.decode(inputs, spans) if decodes else runner.hidden(inputs, spans)
        ends = list(itertools.accumulate(chunk.count for chunk in chunks))
        sampled = [(chunk.request, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        has_prefill = any(chunk.count > 1 for chunk in chunks)
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.request.sampling.needs_prompt_logprobs and chunk.start < chunk.request.prompt_length:
                self._add_prompt_logprobs(runner, chunk, output[end - chunk.count : end])
            chunk.request.num_computed += chunk.count
        if not sampled:
            return None
        requests = [request for request, _ in sampled]
        if len(requests) < ends[-1]:
            output = output[on_device([row for _, row in sampled], output.device)]
        sampler = self._sampler_for(requests, has_prefill)
        logits = output if decodes else runner.compute_logits(output)
        masks = {row: self._forbidden(requests[row]) for row in sampler.restricted_rows}
        forbidden = {row: mask for row, mask in masks.items() if mask is not None}
        tokens = sampler.sample(logits, [request.next_uniform() for request in requests], forbidden)
        indices = [len(request.tokens) + request.num_in_flight for request in requests]
        for request in requests:
            request.num_in_flight += 1
        if self.is_async:
            self._last_tokens.index_copy_(0, self._slot_ids(requests), tokens)
        results = (tokens, *sampler.logprobs(logits, tokens)) if sampler.logprob_rows else (tokens,)
        return SamplerOutput(requests, indices, sampler.logprob_rows, results)

    def _add_prompt_logprobs(self, runner: ModelRunner, chunk: Chunk, hidden: Tensor) -> None:
        """Compute the logprobs of the prompt's tokens that follow the chunk's. hidden: (count, C)."""
        request, sampling = chunk.request, chunk.request.sampling
        targets = request.tokens[chunk.start + 1 : min(chunk.start + chunk.count + 1, request.prompt_length)]
        for first in range(0, len(targets), LOGPROB_ROWS):
            rows = slice(first, min(first + LOGPROB_ROWS, len(targets)))
            logprobs = runner.compute_logits(hidden[rows]).log_softmax(dim=1)
            own = logprobs.gather(1, on_device(targets[rows], hidden.device).unsqueeze(1)).squeeze(1)
            top, ids = logprobs.topk(sampling.logprobs or 0, dim=1)
            request.completion.prompt_logprobs += map(
                token_logprob, targets[rows], own.tolist(), ids.tolist(), top.tolist()
            )

    def _forbidden(self, request: Request) -> Tensor | None:
        """Return the tokens that a request cannot have next, (vocab_size,) bool, or None if it can have all."""
        if request.constraint:
            allowed = torch.from_numpy(request.constraint.allowed(request.max_length - len(request.tokens)))
            return ~allowed.to(self.model.device)
        if request.next_index >= request.sampling.min_tokens:
            return None
        mask = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool, device=self.model.device)
        mask[on_device([*self._end_ids, *request.sampling.stop_token_ids], mask.device)] = True
        return mask

    def _input_tokens(self, chunks: list[Chunk]) -> Tensor:
        """Concatenate the chunks' tokens, (N,). Tokens that the host has not read yet are filled in on the device."""
        tokens: list[int] = []
        in_flight: dict[int, Request] = {}  # by row
        for chunk in chunks:
            tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.count]
            if chunk.start + chunk.count > len(chunk.request.tokens):
                in_flight[len(tokens)] = chunk.request
                tokens.append(0)
        inputs = on_device(tokens, self.model.device)
        if in_flight:
            rows = on_device(list(in_flight), inputs.device)
            inputs.index_copy_(0, rows, self._last_tokens[self._slot_ids(in_flight.values())])
        return inputs

    def _slot_ids(self, requests: Iterable[Request]) -> Tensor:
        return on_device([request.slot for request in requests if request.slot is not None], self.model.device)

    def _sampler_for(self, requests: list[Request], has_prefill: bool) -> Sampler:
        """Return the previous step's sampler if the batch is the same and no request was given tokens in between."""
        batch, sampler = self._sampler
        if has_prefill or batch != requests:
            sampler = Sampler(requests, self.tokenizer.vocab_size, self._suppressed)
            if in_flight := [row for row, request in enumerate(requests) if request.num_in_flight]:
                slots = self._slot_ids(requests[row] for row in in_flight)
                sampler.count(on_device(in_flight, self.model.device), self._last_tokens[slots])
            self._sampler = (requests, sampler)
        return sampler

    def _process(self, output: SamplerOutput) -> None:
        """Append sampled tokens to their requests, except those that ended or were given other tokens since."""
        for request, index, token, logprob in output.read():
            if request.slot is None or request.tool_call or index != len(request.tokens):
                continue
            request.num_in_flight -= 1
            self._append(request, token, sampled=True, logprob=logprob)

    def _append(self, request: Request, token: int, *, sampled: bool, logprob: TokenLogprob | None = None) -> None:
        """Add a token to a completion; release the request if that ends it; start the tool if that ends a call."""
        completion = request.completion
        if request.sampling.max_tokens == 0:
            completion.finish_reason = "length"
            self.scheduler.release(request)
            return
        request.tokens.append(token)
        completion.tokens.append(token)
        completion.sampled.append(sampled)
        self._generated_tokens += 1
        if request.sampling.logprobs is not None:
            completion.logprobs.append(logprob)
        if request.constraint:
            request.constraint.advance(token)
        if token in self._end_ids or token in request.sampling.stop_token_ids or request.found_stop_string():
            completion.finish_reason = "stop"
        elif len(request.tokens) >= request.max_length:
            completion.finish_reason = "length"
        elif token == self._python_start:
            request.tool_code = []
        elif token == self._python_end and request.tool_code is not None:
            if self.tool is not None:
                request.tool_call = self._tool_threads.submit(self.tool.run, self.tokenizer.decode(request.tool_code))
                request.num_in_flight = 0  # discard a token sampled meanwhile: the tool's output comes next
            request.tool_code = None
        elif request.tool_code is not None:
            request.tool_code.append(token)
        if completion.finish_reason:
            self.scheduler.release(request)

    def _tool_calls(self) -> list[Future[str]]:
        return [request.tool_call for request in self.scheduler.running.values() if request.tool_call]

    def _append_tool_outputs(self) -> None:
        for request in list(self.scheduler.running.values()):
            if request.tool_call is None or not request.tool_call.done():
                continue
            output = self.tokenizer.encode(request.tool_call.result())
            request.tool_call = None
            start, end = (self.tokenizer.special(name) for name in ("<|output_start|>", "<|output_end|>"))
            for token in (start, *output, end):
                self._append(request, token, sampled=False)
                if request.completion.finish_reason:
                    break


def spans_of(chunks: Sequence[Chunk]) -> list[Span]:
    """Convert chunks to the model runner's spans; single tokens in adjacent slots share one span."""
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
