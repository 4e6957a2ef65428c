"""Writing replies: many requests in one batch, joining and leaving at any step, with the python tool."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.request import Completion, QueueFullError, Request
from nanochat.inference.sampling import Sampling, sample
from nanochat.tokenizer import Tokenizer

PREFILL_TOKENS = 16_384
"""Most tokens, padding counted, in one forward pass over new prompts."""
NEVER_DRAWN = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|output_start|>", "<|output_end|>")
"""Tokens that are put into a conversation and never the model's own: it cannot play the user or make up a result."""
CACHE_STEP = 128
"""The KV cache's slots are this many tokens long or a multiple."""


class Tool(Protocol):
    """What runs the text between <|python_start|> and <|python_end|>."""

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
    """requests whose prompt began with one that the KV cache held already"""


class Engine:
    """A model that writes. Not for use from several threads at once."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        tool: Tool | None = None,
        max_batch_size: int = 16,
        max_waiting: int | None = None,
    ) -> None:
        """`max_waiting`: requests that may wait for a place in the batch; None: any number."""
        self.model = model
        self.tokenizer = tokenizer
        self.tool = tool
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        """a request's place here is its slot in the cache"""
        self._cache: KVCache | None = None
        self._counts = [0, 0, 0, 0]
        self._end_ids = {tokenizer.bos_id, tokenizer.special("<|assistant_end|>")}
        self._python_start = tokenizer.special("<|python_start|>")
        self._python_end = tokenizer.special("<|python_end|>")
        self._never_drawn = torch.tensor([tokenizer.special(name) for name in NEVER_DRAWN], device=model.device)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Complete every prompt, in their order. Raises UserError if a prompt does not fit the context."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        requests = [self.submit(prompt, own) for prompt, own in zip(prompts, samplings, strict=True)]
        while self.busy:
            self.step()
        return [request.completion for request in requests]

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Queue a prompt; `step` writes on.

        Raises UserError if it leaves no room for an answer in the context, QueueFullError if the queue is full.
        """
        context = self.model.config.sequence_len
        if not 0 < len(prompt) < context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context is {context}: make it shorter"
            )
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise QueueFullError(len(self.waiting), retry_after=1.0)
        request = Request(prompt, sampling)
        self.waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether there is something to write: call `step`."""
        return bool(self.waiting or self.active)

    def stats(self) -> EngineStats:
        """How busy the engine is, and what it has done."""
        kv_bytes = 2 * self._cache.keys.nbytes if self._cache else 0
        return EngineStats(len(self.active), len(self.waiting), self.max_batch_size, kv_bytes, *self._counts)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Stop writing a reply; it leaves the batch at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.active:
            self._release(request)

    @torch.inference_mode()
    def step(self) -> None:
        """Append one token to every request of the batch, or take new ones in and write their first."""
        newcomers = self._admit()
        self._make_room(newcomers)
        if newcomers:
            logits = self._prefill(newcomers)
        elif self.active:
            logits = self._decode()
        else:
            return
        logits = logits[:, : self.tokenizer.vocab_size]  # what lies above only pads the matrix
        logits[:, self._never_drawn] = -torch.inf
        requests = newcomers or list(self.active)
        drawn = sample(logits, [r.sampling for r in requests], [len(r.completion.tokens) for r in requests])
        for request, token in zip(requests, drawn, strict=True):
            self._accept(request, token)
        for request in requests:
            if request.completion.finish_reason:
                self._release(request)

    def _admit(self) -> list[Request]:
        """Move what fits from the queue into the batch, first come first served."""
        newcomers: list[Request] = []
        longest = 0
        while self.waiting and len(self.active) < self.max_batch_size:
            longest = max(longest, self.waiting[0].length)
            if newcomers and longest * (len(newcomers) + 1) > PREFILL_TOKENS:
                break
            newcomers.append(self.waiting.popleft())
            self.active.append(newcomers[-1])
        return newcomers

    def _make_room(self, newcomers: list[Request]) -> None:
        """Let the slots be as long as the longest reply may become: 128 whole contexts of a d20 would take 27 GB."""
        context = self.model.config.sequence_len
        longest = max((len(request.prompt) + request.sampling.max_tokens for request in newcomers), default=0)
        needed = min(-(-longest // CACHE_STEP) * CACHE_STEP, context)
        if self._cache is None or self._cache.length < needed:
            cache = KVCache(self.model, self.max_batch_size, needed)
            if self._cache is not None:
                cache.copy_from(self._cache)
            self._cache = cache

    def _prefill(self, newcomers: list[Request]) -> torch.Tensor:
        """Run the prompts, padded to one length; logits after each prompt's last token, (B, V)."""
        assert self._cache is not None
        lengths = [len(request.prompt) for request in newcomers]
        tokens = torch.full((len(newcomers), max(lengths)), self.tokenizer.bos_id)
        for row, request in zip(tokens, newcomers, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        self._cache.prefill(len(self.active) - len(newcomers), len(newcomers), max(lengths))
        hidden = self.model.hidden(tokens.to(self.model.device), self._cache)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return self.model.head(hidden[torch.arange(len(lengths), device=hidden.device), last])

    def _decode(self) -> torch.Tensor:
        """Run the newest token of every request; logits (B, V)."""
        assert self._cache is not None
        tokens = torch.tensor([[request.completion.tokens[-1]] for request in self.active], device=self.model.device)
        self._cache.decode([request.length - 1 for request in self.active])
        return self.model.head(self.model.hidden(tokens, self._cache)[:, 0])

    def _accept(self, request: Request, drawn: int) -> None:
        """Append the token that is forced, else the one drawn; run the tool at the end of a call."""
        completion = request.completion
        completion.sampled.append(not request.forced)
        token = request.forced.popleft() if request.forced else drawn
        completion.tokens.append(token)
        if token in self._end_ids:
            completion.finish_reason = "stop"
        elif len(completion.tokens) >= request.sampling.max_tokens or request.length >= self.model.config.sequence_len:
            completion.finish_reason = "length"
        elif token == self._python_start:
            request.code = []
        elif token == self._python_end and request.code is not None:
            self._run_tool(request, self.tokenizer.decode(request.code))
            request.code = None
        elif request.code is not None:
            request.code.append(token)

    def _run_tool(self, request: Request, code: str) -> None:
        """Put the tool's output next in the request."""
        if self.tool is not None:
            output = self.tokenizer.encode(self.tool.run(code))
            request.forced.extend(
                [self.tokenizer.special("<|output_start|>"), *output, self.tokenizer.special("<|output_end|>")]
            )

    def _release(self, request: Request) -> None:
        """Take a request out of the batch; the last one moves into its slot."""
        slot = self.active.index(request)
        last = self.active.pop()
        if last is not request:
            assert self._cache is not None
            self.active[slot] = last
            self._cache.move(len(self.active), slot, last.length)
