"""From rows to the batches of a step.

A batch is a function of the step alone: the rows of all epochs are one fixed order, step s takes the next
`rows_per_step` of them, and each process its share. So there is nothing to save and nothing to forget on a resume,
also with another number of processes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.data.packing import Row, Rows, StreamRows
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.model.loss import IGNORE

MOSTLY_TRAINED = 0.9
"""Where more of a batch's targets than this are trained on, picking them out saves nothing."""


class Batch(NamedTuple):
    """One micro-batch: what one forward pass sees."""

    tokens: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64, loss.IGNORE where not trained on"""
    weights: Tensor | None = None
    """(B, T) fp32, what each token's loss counts; None: one"""
    trained: Tensor | None = None
    """(N,) int64, the positions of the flattened targets that are trained on; None: any may be"""

    @property
    def num_trained(self) -> int:
        """Tokens that are trained on."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same on another device, with `trained` if that spares the head much work.

        Conversations train on less than half of their tokens. Here, on the CPU, they are found without a GPU waiting.
        """
        few = self.num_trained < MOSTLY_TRAINED * self.targets.numel()
        trained = (self.targets.flatten() != IGNORE).nonzero().squeeze(1) if few else None
        parts = (self.tokens, self.targets, self.weights, trained)
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in parts))  # type: ignore[arg-type]  # tokens and targets are there

    def split(self, rows: int) -> "list[Batch]":
        """The same rows in batches of at most so many."""
        cuts = [slice(start, start + rows) for start in range(0, len(self.tokens), rows)]
        return [
            Batch(self.tokens[cut], self.targets[cut], None if self.weights is None else self.weights[cut])
            for cut in cuts
        ]


class StepData(NamedTuple):
    """What one process works on in one optimizer step."""

    batches: list[Batch]
    metrics: dict[str, float]
    """what the source itself wants logged at this step"""


class BatchSource(Protocol):
    """Where the trainer gets its data."""

    def step_data(self, step: int) -> StepData:
        """This process's part of optimizer step `step`, a function of the step (and, in RL, of the model)."""


class RowBatches:
    """Rows in a shuffled order, epoch after epoch."""

    def __init__(
        self, rows: Rows, *, rows_per_step: int, device_batch_size: int, world: World, seed: int, trim: bool = False
    ) -> None:
        """`trim`, for padded rows: put rows of like length together and cut the columns that train nothing."""
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.device_batch_size = device_batch_size
        self.world = world
        self.trim = trim
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(rows))
        )

    def row_index(self, position: int) -> int:
        """Which row is the one at `position` of the order, over all epochs and processes."""
        return int(self._permutation(position // len(self.rows))[position % len(self.rows)])

    def row_indices(self, step: int) -> list[int]:
        """The rows of a step, over all processes."""
        first = step * self.rows_per_step
        return [self.row_index(position) for position in range(first, first + self.rows_per_step)]

    def step_data(self, step: int) -> StepData:
        """Micro-batches of at most `device_batch_size` rows, or of trimmed rows as many tokens."""
        mine = [self.rows[i] for i in self.row_indices(step)[self.world.rank :: self.world.size]]
        if not self.trim:
            return StepData(list(stacks(mine, self.device_batch_size)), {"epoch": self.epoch(step)})
        mine.sort(key=trained_length)
        cuts = cuts_by_tokens(list(map(trained_length, mine)), self.device_batch_size * len(mine[0].tokens))
        return StepData([stack(mine[cut], trim=True) for cut in cuts], {"epoch": self.epoch(step)})

    def epoch(self, step: int) -> float:
        """How often the rows have been seen before `step`."""
        return step * self.rows_per_step / len(self.rows)


class ShortRowsFirst:
    """The rows of a training's first steps in pieces, each step's from many places; from then on the rows whole.

    Short rows cost less attention, and what a step learns from is more varied: eight pages instead of two. While a
    model knows little it has no use for long contexts (https://arxiv.org/abs/2012.15832).
    """

    MIXED_STEPS = 64
    """The pieces of so many steps are shuffled together."""

    def __init__(self, whole: RowBatches, pieces: Rows, pieces_per_row: int, steps: int, seed: int) -> None:
        """`pieces`: those of row i are from number i x pieces_per_row on; `steps`: that train on pieces."""
        self.whole = whole
        self.pieces = pieces
        self.pieces_per_row = pieces_per_row
        self.steps = steps
        self._permutation = lru_cache(maxsize=1)(
            lambda block, pieces: np.random.default_rng((seed, block, pieces)).permutation(pieces)
        )

    def piece_index(self, position: int) -> int:
        """Which piece is the one at `position` of the rows' order, were none shuffled."""
        row, piece = divmod(position, self.pieces_per_row)
        return self.whole.row_index(row) * self.pieces_per_row + piece

    def step_data(self, step: int) -> StepData:
        """Micro-batches of the same number of tokens, whether in pieces or whole."""
        if step >= self.steps:
            return self.whole.step_data(step)
        a_step = self.whole.rows_per_step * self.pieces_per_row
        block, in_block = divmod(step, self.MIXED_STEPS)
        first = block * self.MIXED_STEPS
        order = self._permutation(block, min(self.MIXED_STEPS, self.steps - first) * a_step)
        world = self.whole.world
        mine = order[in_block * a_step : (in_block + 1) * a_step][world.rank :: world.size]
        rows = [self.pieces[self.piece_index(first * a_step + int(place))] for place in mine]
        batches = stacks(rows, self.whole.device_batch_size * self.pieces_per_row)
        return StepData(list(batches), {"epoch": self.whole.epoch(step)})


PIECES_PER_ROW = 4
"""Pieces of a row of text that a training begins with; of a context that is no multiple, fewer."""


def text_batches(
    rows: StreamRows, short_rows_ratio: float, num_iterations: int, *,
    rows_per_step: int, device_batch_size: int, world: World, seed: int,
) -> ShortRowsFirst:  # fmt: skip
    """Rows of text in a shuffled order, in pieces for that share of the steps, the first ones."""
    whole = RowBatches(
        rows, rows_per_step=rows_per_step, device_batch_size=device_batch_size, world=world, seed=seed
    )  # fmt: skip
    pieces_per_row = math.gcd(rows.sequence_len, PIECES_PER_ROW)
    steps = round(short_rows_ratio * num_iterations)
    return ShortRowsFirst(whole, rows.in_pieces(pieces_per_row), pieces_per_row, steps, seed)


def rows_per_step(total_batch_size: int, sequence_len: int, world: World) -> int:
    """Rows that make `total_batch_size` tokens. Raises UserError if the processes cannot share them out evenly."""
    unit = sequence_len * world.size
    if total_batch_size < unit or total_batch_size % unit:
        raise UserError(
            f"--total-batch-size {total_batch_size} is not a multiple of {unit} (context x processes): "
            f"the nearest that is is {max(1, round(total_batch_size / unit)) * unit}"
        )
    return total_batch_size // sequence_len


def padded_length(length: int) -> int:
    """The columns of a batch whose longest row is so long: the next multiple of 8, which tensor cores want.

    32 would make fewer shapes, and demo conversations 1.15 times as slow to train on.
    """
    return max(-(-length // 8), 1) * 8


def trained_length(row: Row) -> int:
    """Positions up to the last that is trained on."""
    return int(np.flatnonzero(row.targets != IGNORE).max(initial=-1)) + 1


def cuts_by_tokens(lengths: Sequence[int], most_tokens: int) -> list[slice]:
    """Which rows share a batch, where they are in order of length: as many as have at most so many tokens when padded.

    A longer row than that has one to itself.
    """
    starts = [0]
    for i, length in enumerate(lengths):
        if i > starts[-1] and (i + 1 - starts[-1]) * padded_length(length) > most_tokens:
            starts.append(i)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True) if start < end]


def stacks(rows: list[Row], device_batch_size: int) -> Iterator[Batch]:
    """Batches of at most `device_batch_size` of the rows, in their order."""
    for start in range(0, len(rows), device_batch_size):
        yield stack(rows[start : start + device_batch_size])


def stack(rows: list[Row], trim: bool = False) -> Batch:
    """Rows of one length as a batch."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    targets = torch.from_numpy(np.stack([row.targets for row in rows]))
    if trim:
        length = padded_length(max(map(trained_length, rows)))
        tokens, targets = tokens[:, :length], targets[:, :length]
    return Batch(tokens, targets)


def in_order(rows: Rows, device_batch_size: int, world: World, most_rows: int) -> Iterator[Batch]:
    """This process's part of the first `most_rows` rows, in order; for evaluation."""
    mine = range(world.rank, min(len(rows), most_rows), world.size)
    for start in range(0, len(mine), device_batch_size):
        yield stack([rows[i] for i in mine[start : start + device_batch_size]])
