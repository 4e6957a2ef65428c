"""How likely a model finds each option of a problem, many problems in one forward pass.

What a problem's options have in common at their beginning is run once: the options follow it side by side in one row,
each at the positions that it would have alone, and an attention mask hides them from each other. The head, which at a
vocabulary of 65,536 costs a small model more than all its layers, is computed for the scored tokens only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.runtime import cpu_batch_tokens

PADDING = -1
HEAD_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits at a time."""


@dataclass(frozen=True)
class Option:
    """One answer to a problem, with all that stands before it."""

    tokens: list[int]
    start: int
    """`tokens[start:]` is scored; at least 1, for the first token has nothing to be predicted from"""


@dataclass(frozen=True)
class Problem:
    """What may be answered. Right is the likeliest option; of a single one, that the model would write just that."""

    options: list[Option]
    gold: int


@dataclass(frozen=True)
class OptionScore:
    """What a model thinks of one option."""

    mean_loss: float
    """cross-entropy in nats, the mean of the scored tokens"""
    is_greedy: bool
    """whether each scored token is the likeliest in its place"""


def is_right(problem: Problem, scores: Sequence[OptionScore]) -> bool:
    """Whether the model prefers the right option, or would write the only one token for token."""
    if len(scores) == 1:
        return scores[0].is_greedy
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == problem.gold


@dataclass(frozen=True)
class _Row:
    """A problem as one row of tokens: the common beginning, then the rest of each option."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    """0 in the common beginning, from 1 on in the options"""
    sources: list[int]
    """places in the row from which a scored token is predicted"""
    targets: list[int]
    """the scored tokens"""
    counts: list[int]
    """how many of them each option has"""


def score_options(model: GPT, problems: Sequence[Problem], batch_tokens: int) -> Iterator[list[OptionScore]]:
    """The options' scores of each problem, in the order of `problems`.

    `batch_tokens`: most tokens in one forward pass, padding counted; a problem that has more goes alone.
    """
    if model.device.type == "cpu":
        batch_tokens = min(batch_tokens, cpu_batch_tokens(model.compute_dtype))
    rows = [_row(problem) for problem in problems]
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))  # memory runs out at once or never
    scores: dict[int, list[OptionScore]] = {}
    while longest_first:
        size = max(1, batch_tokens // len(rows[longest_first[0]].tokens))
        batch, longest_first = longest_first[:size], longest_first[size:]
        scores |= zip(batch, _score_rows(model, [rows[i] for i in batch]), strict=True)
    return (scores[i] for i in range(len(rows)))


def _row(problem: Problem) -> _Row:
    alike = common_prefix([option.tokens for option in problem.options])
    shared = min(alike, *(option.start for option in problem.options))
    row = _Row(problem.options[0].tokens[:shared], list(range(shared)), [0] * shared, [], [], [])
    for branch, option in enumerate(problem.options, start=1):
        rest = option.tokens[shared:]
        offset = len(row.tokens) - shared  # of this option's own tokens in the row, against where it has them
        scored = range(option.start, len(option.tokens))
        row.sources.extend(at - 1 if at == shared else at - 1 + offset for at in scored)
        row.targets.extend(option.tokens[option.start :])
        row.counts.append(len(scored))
        row.tokens.extend(rest)
        row.positions.extend(range(shared, len(option.tokens)))
        row.branches.extend([branch] * len(rest))
    return row


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(tokens[i] != first[i] for tokens in sequences)), shortest)


class _Branches:
    """The `AttentionCache` of rows with branches: it keeps nothing, and gives positions and mask."""

    def __init__(self, positions: Tensor, branches: Tensor) -> None:
        """positions, branches: (B, T). A token sees what precedes it in the beginning and in its own branch."""
        self.positions = positions
        keys, queries = branches[:, None, :], branches[:, :, None]
        self._mask = (((keys == 0) | (keys == queries)).tril())[:, None]  # (B, 1, T, T)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The row's own keys and values, and the mask."""
        return key, value, self._mask


@torch.inference_mode()
def _score_rows(model: GPT, rows: Sequence[_Row]) -> list[list[OptionScore]]:
    tokens, positions, branches = (
        _padded(columns, fill).to(model.device)
        for columns, fill in (
            ([row.tokens for row in rows], 0),
            ([row.positions for row in rows], 0),
            ([row.branches for row in rows], PADDING),
        )
    )
    # Rows of one option each are plain text, for which causal attention does half the work.
    plain = all(len(row.counts) == 1 for row in rows)
    hidden = model.hidden(tokens, None if plain else _Branches(positions, branches))
    where = torch.tensor([(i, source) for i, row in enumerate(rows) for source in row.sources], device=model.device)
    targets = torch.tensor([target for row in rows for target in row.targets], device=model.device)
    losses, hits = _judge(model, hidden[where[:, 0], where[:, 1]], targets)
    counts = [count for row in rows for count in row.counts]
    options = iter(
        OptionScore(float(loss.mean()), bool(hit.all()))
        for loss, hit in zip(losses.split(counts), hits.split(counts), strict=True)
    )
    return [[next(options) for _ in row.counts] for row in rows]


def _judge(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's loss, and whether it is the likeliest token, on the CPU. (N, C), (N,) -> (N,), (N,)."""
    size = max(1, HEAD_ELEMENTS.get(hidden.device.type, HEAD_ELEMENTS["cuda"]) // model.config.vocab_size)
    losses, hits = [], []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.head(part)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(dim=1) == target)
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()


def _padded(columns: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, longest), filled on the right."""
    padded = torch.full((len(columns), max(map(len, columns))), fill)
    for row, values in zip(padded, columns, strict=True):
        row[: len(values)] = torch.tensor(values)
    return padded
