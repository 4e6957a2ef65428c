"""Sampling the next tokens from logits, on the device."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from nanochat.inference.detokenizer import TokenLogprob
from nanochat.inference.model_runner import on_device
from nanochat.inference.sampling_params import GREEDY_BELOW, SamplingParams
from nanochat.inference.scheduler import Request

Method = Literal["greedy", "top", "all"]
MAX_UNIFORM = 1 - 2**-23  # a float64 closer to 1 could round to 1 in fp32, which no cumulative probability exceeds


class Sampler:
    """Samples one token per request in a batch. Valid as long as the batch does not change.

    A request's token depends on its own row of logits only, not on the rest of the batch.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int, suppressed: Tensor) -> None:
        """suppressed: token ids that are never sampled."""
        device = suppressed.device
        self.suppressed = suppressed
        samplings = [request.sampling for request in requests]
        rows_of: dict[Method, list[int]] = {}
        for row, sampling in enumerate(samplings):
            method: Method = "top" if sampling.top_k or sampling.top_p < 1 else "all"
            if sampling.temperature < GREEDY_BELOW:
                method = "greedy"
            rows_of.setdefault(method, []).append(row)
        self._groups = [
            (on_device(rows, device), _Group([samplings[row] for row in rows], method, vocab_size, suppressed))
            for method, rows in rows_of.items()
        ]
        self._penalties: _Penalties | None = None
        if any(s.repetition_penalty != 1 or s.frequency_penalty or s.presence_penalty for s in samplings):
            self._penalties = _Penalties(requests, vocab_size, device)
        biases = [(row, token, bias) for row, s in enumerate(samplings) for token, bias in s.logit_bias]
        self._biases = [on_device(values, device) for values in zip(*biases, strict=True)]
        self.restricted_rows = [row for row, s in enumerate(samplings) if s.constraint or s.min_tokens]
        self.logprob_rows = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        self._max_logprobs = max((s.logprobs for s in samplings if s.logprobs is not None), default=0)

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        """Add one token to the reply of each of these rows, for the penalties."""
        if self._penalties:
            self._penalties.count(rows, tokens)

    def sample(
        self, logits: Tensor, uniforms: Sequence[float], forbidden: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """Sample tokens, (N,).

        logits: (N, V), set to -inf at suppressed tokens. uniforms: N numbers in [0, 1). forbidden: tokens that a row
        cannot have in this step, (V,) bool, by row.
        """
        logits.index_fill_(1, self.suppressed, -torch.inf)
        if self._penalties:
            logits = self._penalties.apply(logits)
        if self._biases:
            rows, ids, values = self._biases
            logits = logits.index_put((rows, ids), values, accumulate=True)
        if forbidden:
            logits = logits.clone()
            for row, mask in forbidden.items():
                logits[row].masked_fill_(mask, -torch.inf)
        numbers = on_device([min(number, MAX_UNIFORM) for number in uniforms], logits.device).unsqueeze(1)
        if len(self._groups) == 1:
            tokens = self._groups[0][1].sample(logits, numbers)
        else:
            tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
            for group_rows, group in self._groups:
                tokens[group_rows] = group.sample(logits[group_rows], numbers[group_rows])
        if self._penalties:
            self._penalties.count(torch.arange(len(tokens), device=tokens.device), tokens)
        return tokens

    def logprobs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for `logprob_rows`, the logprob of the token (R,), the top logprobs and their token ids (R, max).

        logits: (N, V) as `sample` leaves them. tokens: (N,).
        """
        rows = on_device(self.logprob_rows, logits.device)
        logprobs = logits[rows].log_softmax(dim=1)
        top, ids = logprobs.topk(self._max_logprobs, dim=1)
        return logprobs.gather(1, tokens[rows].unsqueeze(1)).squeeze(1), top, ids


def token_logprob(token: int, logprob: float, ids: Sequence[int], top: Sequence[float]) -> TokenLogprob:
    """Build a TokenLogprob whose nonempty alternatives include the token itself."""
    alternatives = tuple(zip(ids, top, strict=True))
    if ids and token not in ids:
        alternatives += ((token, logprob),)
    return TokenLogprob(token, logprob, alternatives)


class _Group:
    """Requests with the same sampling method: greedy, from the top k (which needs sorting), or from all tokens."""

    def __init__(
        self, samplings: Sequence[SamplingParams], method: Method, vocab_size: int, suppressed: Tensor
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return on_device(values, suppressed.device).unsqueeze(1)

        self.method = method
        if method == "greedy":
            return
        max_k = vocab_size - len(suppressed)
        ks = [min(s.top_k or max_k, max_k) for s in samplings]
        self.k = max(ks)
        ranks = torch.arange(self.k, device=suppressed.device)
        self.beyond_k = ranks >= column(ks) if method == "top" and min(ks) < self.k else None
        self.inverse_temperature = column([1 / s.temperature for s in samplings])
        self.log_min_p = column([s.min_p for s in samplings]).log() if any(s.min_p for s in samplings) else None
        self.top_p = column([s.top_p for s in samplings]) if any(s.top_p < 1 for s in samplings) else None

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Sample tokens, (N,). logits: (N, V); uniforms: (N, 1)."""
        if self.method == "greedy":
            return logits.argmax(dim=1)
        tokens = None
        if self.method == "top":
            logits, tokens = logits.topk(self.k, dim=1)
        choice = self._choose(logits * self.inverse_temperature, uniforms)
        return (choice if tokens is None else tokens.gather(1, choice)).squeeze(1)

    def _choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return one column per row, (N, 1): where the cumulative probability exceeds the random number."""
        if self.beyond_k is not None:
            logits.masked_fill_(self.beyond_k, -torch.inf)
        if self.log_min_p is not None:
            logits.masked_fill_(logits < logits.amax(dim=1, keepdim=True) + self.log_min_p, -torch.inf)
        probabilities = logits.softmax(dim=1)
        cumulative = probabilities.cumsum(dim=1)
        if self.top_p is not None:
            beyond = cumulative - probabilities >= self.top_p
            beyond[:, 0] = False  # keep the most likely token: a top_p below 1e-45 is 0 in fp32
            cumulative = probabilities.masked_fill_(beyond, 0).cumsum(dim=1)
        columns = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        # With NaN logits (a broken model) the search returns a column past the end, which would fail the whole batch.
        return columns.clamp_(max=logits.size(1) - 1)


class _Penalties:
    """Repetition, frequency and presence penalties of a batch."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self.repetition, self.frequency, self.presence = (
            on_device([getattr(r.sampling, f"{name}_penalty") for r in requests], device).unsqueeze(1)
            for name in ("repetition", "frequency", "presence")
        )
        self.counts = torch.zeros(len(requests), vocab_size, device=device)  # in the reply
        self.seen = torch.zeros(len(requests), vocab_size, dtype=torch.bool, device=device)  # in prompt or reply
        for row, request in enumerate(requests):
            ids = on_device(request.tokens, device).long()
            self.seen[row].index_fill_(0, ids, True)
            self.counts[row] += torch.bincount(ids[request.prompt_length :], minlength=vocab_size)

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        self.counts[rows, tokens] += 1
        self.seen[rows, tokens] = True

    def apply(self, logits: Tensor) -> Tensor:
        """Return penalized logits, (N, V)."""
        penalized = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        penalized = torch.where(self.seen, penalized, logits)
        return penalized - self.frequency * self.counts - self.presence * (self.counts > 0)


class SamplerOutput:
    """One sampled token per request, on its way to the host. On CUDA, only `read` waits for the device."""

    def __init__(
        self, requests: list[Request], indices: list[int], logprob_rows: list[int], results: Sequence[Tensor]
    ) -> None:
        """indices: of the tokens in their requests. results: tokens (N,), then what `Sampler.logprobs` returned."""
        self.requests, self.indices, self.logprob_rows = requests, indices, logprob_rows
        self.results = [result.to("cpu", non_blocking=True) for result in results]
        self.copied = torch.cuda.Event() if results[0].is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self) -> list[tuple[Request, int, int, TokenLogprob | None]]:
        """Return request, index, token and logprob of each row."""
        if self.copied:
            self.copied.synchronize()
        tokens = self.results[0].tolist()
        logprobs: dict[int, TokenLogprob] = {}
        if self.logprob_rows:
            for row, logprob, top, ids in zip(self.logprob_rows, *(r.tolist() for r in self.results[1:]), strict=True):
                count = self.requests[row].sampling.logprobs
                logprobs[row] = token_logprob(tokens[row], logprob, ids[:count], top[:count])
        return [
            (request, index, token, logprobs.get(row))
            for row, (request, index, token) in enumerate(zip(self.requests, self.indices, tokens, strict=True))
        ]
