"""From token files to the batches of a step.

Documents of any length become rows of one length without losing a token. The rows of all epochs have one fixed order;
step s takes the next `rows_per_step` of them, split across processes. A batch depends only on the step, so checkpoints
store no loader state and a run can resume with a different number of processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.data.token_files import TokenFile, TokenShards
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.model.loss import IGNORE
from nanochat.runtime import copy_to

MAX_GATHERED_SHARE = 0.9
"""Fraction of trained targets above which gathering their hidden states for the head saves nothing."""
PIECES_PER_ROW = 4
"""Short rows at the start of pretraining are a quarter of the context, or the next size that divides it."""


class Row(NamedTuple):
    tokens: np.ndarray  # (T,) int64, starting with bos
    targets: np.ndarray  # (T,) int64, the next token, or IGNORE if it is not trained on


class Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class StreamRows:
    """Text as one stream of documents, cut every `sequence_len` tokens.

    Row r predicts tokens [r T, (r + 1) T) of the stream from bos and the preceding tokens of the row. Each token is a
    target exactly once, and rows are independent of each other.
    """

    stream: TokenFile | TokenShards
    sequence_len: int
    bos_id: int

    def split(self, pieces_per_row: int) -> "StreamRows":
        """The same stream in shorter rows: row i becomes rows i x pieces_per_row and up."""
        return StreamRows(self.stream, self.sequence_len // pieces_per_row, self.bos_id)

    def __len__(self) -> int:
        """Number of rows; the last one is padded."""
        return -(-len(self.stream.ids) // self.sequence_len)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; past the end of the stream, a row without targets."""
        stream = self.stream.ids[index * self.sequence_len : (index + 1) * self.sequence_len].astype(np.int64)
        tokens = np.full(self.sequence_len, self.bos_id, np.int64)
        targets = np.full(self.sequence_len, IGNORE, np.int64)
        tokens[1 : len(stream) + 1] = stream[: self.sequence_len - 1]
        targets[: len(stream)] = stream
        if len(stream) and stream[0] == self.bos_id:  # the row starts with a document, which has its own bos
            targets[0] = IGNORE
        return Row(tokens, targets)


class Batch(NamedTuple):
    """One micro-batch: the input of one forward pass."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE if not trained on
    weights: Tensor | None = None  # (B, T) fp32, weight of each token's loss; None: one
    trained: Tensor | None = None  # (N,) int64, trained positions of the flattened targets; None: any may be

    @property
    def num_trained(self) -> int:
        return int((self.targets != IGNORE).sum())

    @property
    def trained_share(self) -> float:
        return self.num_trained / self.targets.numel()

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, with `trained` if that saves the head a lot of work.

        Conversations train on less than half of their tokens. The positions are computed here, on the CPU, so that a
        GPU does not wait for them.
        """
        gather = self.trained_share < MAX_GATHERED_SHARE
        trained = (self.targets.flatten() != IGNORE).nonzero().squeeze(1) if gather else None
        parts = (self.tokens, self.targets, self.weights, trained)
        return Batch(*(None if part is None else copy_to(device, part) for part in parts))  # type: ignore[arg-type]  # tokens and targets are not None

    def split(self, rows: int) -> "list[Batch]":
        """Batches of at most `rows` rows."""
        cuts = [slice(start, start + rows) for start in range(0, len(self.tokens), rows)]
        return [
            Batch(self.tokens[cut], self.targets[cut], None if self.weights is None else self.weights[cut])
            for cut in cuts
        ]


class StepData(NamedTuple):
    """The part of one optimizer step that one process works on."""

    batches: list[Batch]
    metrics: dict[str, float]  # logged with the step


class BatchSource(Protocol):
    """Anything the training loop gets batches from."""

    def step_data(self, step: int) -> StepData:
        """This process's part of optimizer step `step`: a function of the step and, in RL, of the model."""


class RowBatches:
    """Rows in a shuffled order, epoch after epoch, from position `first_row` of that order."""

    def __init__(
        self, rows: Rows, *, rows_per_step: int, device_batch_size: int, world: World, seed: int, first_row: int = 0
    ) -> None:
        self.rows = rows
        self.first_row = first_row
        self.rows_per_step = rows_per_step
        self.device_batch_size = device_batch_size
        self.world = world
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(rows))
        )

    def row_index(self, position: int) -> int:
        """Index of the row at `position` of the order over all epochs and processes, counted from `first_row`."""
        position += self.first_row
        return int(self._permutation(position // len(self.rows))[position % len(self.rows)])

    def row_indices(self, step: int) -> list[int]:
        first = step * self.rows_per_step
        return [self.row_index(position) for position in range(first, first + self.rows_per_step)]

    def step_data(self, step: int) -> StepData:
        """Micro-batches of at most `device_batch_size` rows."""
        indices = self.row_indices(step)[self.world.rank :: self.world.size]
        return StepData(list(stack_all(self.rows, indices, self.device_batch_size)), {"epoch": self.epoch(step)})

    def epoch(self, step: int) -> float:
        return (self.first_row + step * self.rows_per_step) / len(self.rows)


class ShortRowsFirst:
    """Pretraining batches: shuffled pieces of rows in the first steps, whole rows after that.

    Short rows cost less attention, and each step learns from more documents. An untrained model has no use for a long
    context (https://arxiv.org/abs/2012.15832).
    """

    SHUFFLED_STEPS = 64  # the pieces of this many steps are shuffled together

    def __init__(self, whole: RowBatches, pieces: Rows, pieces_per_row: int, steps: int, seed: int) -> None:
        """`pieces`: row i consists of pieces i x pieces_per_row and up; `steps`: number of steps on pieces."""
        self.whole = whole
        self.pieces = pieces
        self.pieces_per_row = pieces_per_row
        self.steps = steps
        self._permutation = lru_cache(maxsize=1)(
            lambda block, pieces: np.random.default_rng((seed, block, pieces)).permutation(pieces)
        )

    def piece_index(self, position: int) -> int:
        """Index of the piece at `position` of the order before shuffling."""
        row, piece = divmod(position, self.pieces_per_row)
        return self.whole.row_index(row) * self.pieces_per_row + piece

    def step_data(self, step: int) -> StepData:
        """Micro-batches of pieces or of whole rows, with the same number of tokens."""
        if step >= self.steps:
            return self.whole.step_data(step)
        pieces_per_step = self.whole.rows_per_step * self.pieces_per_row
        block, in_block = divmod(step, self.SHUFFLED_STEPS)
        start = block * self.SHUFFLED_STEPS
        order = self._permutation(block, min(self.SHUFFLED_STEPS, self.steps - start) * pieces_per_step)
        world = self.whole.world
        own = order[in_block * pieces_per_step : (in_block + 1) * pieces_per_step][world.rank :: world.size]
        indices = [self.piece_index(start * pieces_per_step + int(place)) for place in own]
        batches = stack_all(self.pieces, indices, self.whole.device_batch_size * self.pieces_per_row)
        return StepData(list(batches), {"epoch": self.whole.epoch(step)})


def text_batches(
    rows: StreamRows, short_rows_ratio: float, num_iterations: int, *,
    rows_per_step: int, device_batch_size: int, world: World, seed: int, first_row: int = 0,
) -> ShortRowsFirst:  # fmt: skip
    """Batches for pretraining, with short rows in the first `short_rows_ratio` of the steps."""
    whole = RowBatches(
        rows, rows_per_step=rows_per_step, device_batch_size=device_batch_size, world=world, seed=seed,
        first_row=first_row,
    )  # fmt: skip
    pieces_per_row = math.gcd(rows.sequence_len, PIECES_PER_ROW)
    steps = round(short_rows_ratio * num_iterations)
    return ShortRowsFirst(whole, rows.split(pieces_per_row), pieces_per_row, steps, seed)


def rows_per_step(total_batch_size: int, sequence_len: int, world: World) -> int:
    """Rows that make up `total_batch_size` tokens. Raises UserError if the processes cannot share them evenly."""
    unit = sequence_len * world.size
    if total_batch_size < unit or total_batch_size % unit:
        raise UserError(
            f"--total-batch-size must be a multiple of {unit} (sequence length x processes), got {total_batch_size}; "
            f"nearest: {max(1, round(total_batch_size / unit)) * unit}"
        )
    return total_batch_size // sequence_len


def stack_all(rows: Rows, indices: Sequence[int], device_batch_size: int) -> Iterator[Batch]:
    """Batches of at most `device_batch_size` of the rows with these indices, in order."""
    for start in range(0, len(indices), device_batch_size):
        yield stack([rows[i] for i in indices[start : start + device_batch_size]])


def stack(rows: Sequence[Row]) -> Batch:
    tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return Batch(tokens, targets)


def in_order(rows: Rows, device_batch_size: int, world: World, max_rows: int) -> Iterator[Batch]:
    """This process's part of the first `max_rows` rows, in order; for evaluation."""
    return stack_all(rows, range(world.rank, min(len(rows), max_rows), world.size), device_batch_size)
