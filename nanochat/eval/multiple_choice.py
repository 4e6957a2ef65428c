"""Score the options of multiple-choice problems, many problems per forward pass.

The common prefix of a problem's options is computed once. The options follow it in the same row, each at the positions
that it would have alone, and an attention mask hides them from each other. The head, which is a large part of
a small model's work, is computed for the scored tokens only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.model.gpt import GPT
from nanochat.model.loss import SLICE_ELEMENTS
from nanochat.runtime import cpu_batch_tokens


@dataclass(frozen=True)
class Option:
    """One answer to a problem, with the text before it."""

    tokens: list[int]
    start: int  # `tokens[start:]` is scored; at least 1, because nothing predicts the first token


@dataclass(frozen=True)
class Problem:
    """Correct if the likeliest option is the right one; a single option must be the greedy continuation."""

    options: list[Option]
    gold: int  # index of the right option


class OptionScore(NamedTuple):
    mean_loss: float  # mean cross-entropy of the scored tokens, in nats
    is_greedy: bool  # True if every scored token is the likeliest at its position


def is_right(problem: Problem, scores: Sequence[OptionScore]) -> bool:
    """True if the right option has the lowest loss, or the only option is the greedy continuation."""
    if len(scores) == 1:
        return scores[0].is_greedy
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == problem.gold


@dataclass(frozen=True)
class _Row:
    """A problem as one row of tokens: the common prefix, then the rest of each option."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]  # 0 in the common prefix, 1 and up in the options
    sources: list[int]  # index in the row of the token that predicts each scored token
    targets: list[int]  # the scored tokens
    counts: list[int]  # number of scored tokens of each option


def score_options(model: GPT, problems: Sequence[Problem], batch_tokens: int) -> Iterator[list[OptionScore]]:
    """Scores of the options of each problem, in the order of `problems`.

    `batch_tokens`: max tokens in one forward pass, padding included. A problem with more tokens is a batch by itself.
    """
    if model.device.type == "cpu":
        batch_tokens = min(batch_tokens, cpu_batch_tokens(model.compute_dtype))
    rows = [_row(problem) for problem in problems]
    # Longest first, so that if memory runs out, it does so in the first batch.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    scores: dict[int, list[OptionScore]] = {}
    while order:
        size = max(1, batch_tokens // len(rows[order[0]].tokens))
        batch, order = order[:size], order[size:]
        scores |= zip(batch, _score_rows(model, [rows[i] for i in batch]), strict=True)
    return (scores[i] for i in range(len(rows)))


def _row(problem: Problem) -> _Row:
    options = problem.options
    shared = min(common_prefix([option.tokens for option in options]), *(option.start for option in options))
    row = _Row(options[0].tokens[:shared], list(range(shared)), [0] * shared, [], [], [])
    for branch, option in enumerate(options, start=1):
        rest = option.tokens[shared:]
        offset = len(row.tokens) - shared  # index in the row - index in the option, past the prefix
        scored = range(option.start, len(option.tokens))
        row.sources.extend(at - 1 if at == shared else at - 1 + offset for at in scored)
        row.targets.extend(option.tokens[option.start :])
        row.counts.append(len(scored))
        row.tokens.extend(rest)
        row.positions.extend(range(shared, len(option.tokens)))
        row.branches.extend([branch] * len(rest))
    return row


def common_prefix(sequences: list[list[int]]) -> int:
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def _mask(branches: Tensor) -> Tensor:
    """A token attends to the prefix and to earlier tokens of its own branch. (B, T) -> (B, 1, T, T)."""
    keys, queries = branches[:, None, :], branches[:, :, None]
    return ((keys == 0) | (keys == queries)).tril()[:, None]


@torch.inference_mode()
def _score_rows(model: GPT, rows: Sequence[_Row]) -> list[list[OptionScore]]:
    device = model.device
    tokens, positions, branches = (
        pad_sequence([torch.tensor(values) for values in columns], batch_first=True, padding_value=-1)
        for columns in zip(*((row.tokens, row.positions, row.branches) for row in rows), strict=True)
    )
    tokens, positions, branches = tokens.clamp(min=0).to(device), positions.clamp(min=0).to(device), branches.to(device)
    # With one option per row, causal attention needs no mask and does half the work.
    causal = all(len(row.counts) == 1 for row in rows)
    hidden = model.hidden(tokens) if causal else model.hidden(tokens, positions, _mask(branches))
    where = torch.tensor([(i, source) for i, row in enumerate(rows) for source in row.sources], device=device)
    targets = torch.tensor([target for row in rows for target in row.targets], device=device)
    losses, hits = _token_scores(model, hidden[where[:, 0], where[:, 1]], targets)
    counts = [count for row in rows for count in row.counts]
    options = iter(
        OptionScore(float(loss.mean()), bool(hit.all()))
        for loss, hit in zip(losses.split(counts), hits.split(counts), strict=True)
    )
    return [[next(options) for _ in row.counts] for row in rows]


def _token_scores(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each target, and if it is the likeliest token, on the CPU. (N, C), (N,) -> (N,), (N,)."""
    size = max(1, SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cuda"]) // model.config.vocab_size)
    losses, hits = [], []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.head(part)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(dim=1) == target)
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()
