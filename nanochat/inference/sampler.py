"""From logits to the next tokens, on the device."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nanochat.inference.model_runner import on_device, soft_cap
from nanochat.inference.sampling_params import GREEDY_BELOW, SamplingParams

Method = Literal["greedy", "ranked", "any"]
HIGHEST_DRAW = 1 - 2**-23
"""A draw nearer to 1 could become 1 in fp32, which no cumulative probability passes."""


class Sampler:
    """Chooses a token for each request of a batch; good for as long as the batch is the same.

    What a request gets depends on its own row alone, so that company changes nothing.
    """

    def __init__(
        self, samplings: Sequence[SamplingParams], held: Sequence[Sequence[int]], vocab_size: int, never_drawn: Tensor
    ) -> None:
        """`held`: the tokens that each request has so far; `never_drawn`: tokens that the model may not choose."""
        self.never_drawn = never_drawn
        kinds: dict[tuple[Method, bool], list[int]] = {}
        for row, sampling in enumerate(samplings):
            kinds.setdefault((_method(sampling), sampling.repetition_penalty != 1), []).append(row)
        self._groups = [
            (on_device(rows, never_drawn.device),
             _Group([samplings[row] for row in rows], method, vocab_size, never_drawn))
            for (method, _), rows in kinds.items()
        ]  # fmt: skip
        self.penalised = any(penalised for _, penalised in kinds)
        self._seen: Tensor | None = None
        """(N, V), the tokens that each request holds already, if a repetition penalty asks for them"""
        if self.penalised:
            self._seen = torch.zeros(len(samplings), vocab_size, dtype=torch.bool, device=never_drawn.device)
            for row, tokens in enumerate(held):
                self._seen[row].index_fill_(0, on_device(tokens, never_drawn.device), True)
        self.logprob_rows = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        self._most_logprobs = max((s.logprobs for s in samplings if s.logprobs is not None), default=0)

    def mark(self, rows: list[int], tokens: Tensor) -> None:
        """Note that the requests at `rows` hold these tokens too."""
        if self._seen is not None:
            self._seen.index_put_(
                (on_device(rows, tokens.device), tokens), torch.ones((), dtype=torch.bool, device=tokens.device)
            )

    def draw(self, logits: Tensor, draws: Sequence[float]) -> Tensor:
        """The tokens, (N,). logits: (N, V) before the soft cap, which are overwritten; draws: N numbers in [0, 1)."""
        logits.index_fill_(1, self.never_drawn, -torch.inf)
        numbers = on_device([min(draw, HIGHEST_DRAW) for draw in draws], logits.device).unsqueeze(1)
        if len(self._groups) == 1:
            tokens = self._groups[0][1].draw(logits, numbers, self._seen)
        else:
            tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
            for rows, group in self._groups:
                seen = None if self._seen is None else self._seen[rows]
                tokens[rows] = group.draw(logits[rows], numbers[rows], seen)
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def logprobs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each of `logprob_rows`: the token's logprob (R,), and the likeliest tokens' and their ids (R, most).

        logits: (N, V) as `draw` has left them; tokens: (N,).
        """
        rows = on_device(self.logprob_rows, logits.device)
        logprobs = soft_cap(logits[rows]).index_fill_(1, self.never_drawn, -torch.inf).log_softmax(dim=1)
        top, ids = logprobs.topk(self._most_logprobs, dim=1)
        return logprobs.gather(1, tokens[rows].unsqueeze(1)).squeeze(1), top, ids


class _Group:
    """Requests whose tokens are chosen in the same way."""

    def __init__(
        self, samplings: Sequence[SamplingParams], method: Method, vocab_size: int, never_drawn: Tensor
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return on_device(values, never_drawn.device).unsqueeze(1)

        self.method = method
        self.never_drawn = never_drawn
        self.penalty = (
            column([s.repetition_penalty for s in samplings]) if samplings[0].repetition_penalty != 1 else None
        )
        if method == "greedy":
            return
        drawable = vocab_size - len(never_drawn)
        ks = [min(s.top_k or drawable, drawable) for s in samplings]
        self.most = max(ks)
        ranks = torch.arange(self.most, device=never_drawn.device)
        self.outside = ranks >= column(ks) if method == "ranked" and min(ks) < self.most else None
        self.inverse_temperature = column([1 / s.temperature for s in samplings])
        self.log_min_p = column([s.min_p for s in samplings]).log() if any(s.min_p for s in samplings) else None
        self.top_p = column([s.top_p for s in samplings]) if any(s.top_p < 1 for s in samplings) else None

    def draw(self, logits: Tensor, draws: Tensor, seen: Tensor | None) -> Tensor:
        """As Sampler.draw, with draws (N, 1)."""
        if self.penalty is not None:
            assert seen is not None
            logits = soft_cap(logits)
            penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(seen, penalised, logits).index_fill_(1, self.never_drawn, -torch.inf)
        if self.method == "greedy":
            return logits.argmax(dim=1)
        tokens = None
        if self.method == "ranked":
            # The cap changes no order: of 8,192 logits, only those that may be drawn need it.
            logits, tokens = logits.topk(self.most, dim=1)
        if self.penalty is None:
            logits = soft_cap(logits)
            if tokens is None:
                logits.index_fill_(1, self.never_drawn, -torch.inf)
        choice = self._choose(logits.mul_(self.inverse_temperature), draws)
        return choice if tokens is None else tokens.gather(1, choice.unsqueeze(1)).squeeze(1)

    def _choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """A column of each row, (N,): the one at which the cumulative probability passes the draw."""
        if self.outside is not None:
            logits.masked_fill_(self.outside, -torch.inf)
        if self.log_min_p is not None:
            logits.masked_fill_(logits < logits.amax(dim=1, keepdim=True) + self.log_min_p, -torch.inf)
        probabilities = logits.softmax(dim=1)
        cumulative = probabilities.cumsum(dim=1)
        if self.top_p is not None:
            beyond = cumulative - probabilities >= self.top_p
            beyond[:, 0] = False  # the likeliest may always be drawn; a top_p below 1e-45 is 0 in fp32
            cumulative = probabilities.masked_fill_(beyond, 0).cumsum(dim=1)
        columns = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(1)
        # Of NaN, which a broken model may give, no column passes a draw; one past the last would break the whole batch.
        return columns.clamp_(max=logits.size(1) - 1)


def _method(sampling: SamplingParams) -> Method:
    """Greedy; among the likeliest, which must be ranked; or among all, which need not."""
    if sampling.temperature < GREEDY_BELOW:
        return "greedy"
    return "ranked" if sampling.top_k or sampling.top_p < 1 else "any"
