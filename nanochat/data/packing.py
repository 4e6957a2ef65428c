"""Conversations packed whole into rows, and batches of padded rows without most of the padding."""

from collections.abc import Sequence

import numpy as np

from nanochat.data.batches import Batch, Row, RowBatches, StepData, stack
from nanochat.data.token_files import TokenFile
from nanochat.model.loss import IGNORE


class PackedRows:
    """Whole conversations packed into rows, with padding; longer ones lose their ends."""

    def __init__(
        self, file: TokenFile, sequence_len: int, bos_id: int, *, learn_all: bool, documents_per_row: int | None = None
    ) -> None:
        """`learn_all`: train on every token, ignoring the mask; `documents_per_row`: maximum, or None."""
        self.file = file
        self.sequence_len = sequence_len
        self.bos_id = bos_id
        self.learn_all = learn_all or file.mask is None
        offsets = file.offsets[:]
        lengths = np.minimum(np.diff(offsets), sequence_len)
        self.num_cut = int((np.diff(offsets) > sequence_len).sum())
        self.tokens_lost = int(offsets[-1] - lengths.sum())
        self.rows = best_fit(offsets[:-1].tolist(), lengths.tolist(), sequence_len, documents_per_row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        tokens = np.full(self.sequence_len, self.bos_id, np.int64)
        targets = np.full(self.sequence_len, IGNORE, np.int64)
        at = 0
        for start, length in self.rows[index]:
            document = self.file.ids[start : start + length].astype(np.int64)
            tokens[at : at + length] = document
            trained = document[1:].copy()
            if not self.learn_all:
                assert self.file.mask is not None
                trained[self.file.mask[start + 1 : start + length] == 0] = IGNORE
            targets[at : at + length - 1] = trained
            at += length
        return Row(tokens, targets)


def best_fit(
    starts: list[int], lengths: list[int], capacity: int, max_per_row: int | None = None
) -> list[list[tuple[int, int]]]:
    """Best-fit decreasing packing: rows of (start, length).

    Rows that are not full are kept in buckets by free space: O(documents x capacity) at worst, close to linear in
    practice. Ties keep their order, so the result depends only on the arguments.
    """
    rows: list[list[tuple[int, int]]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        space = next((space for space in range(lengths[i], capacity) if by_space[space]), None)
        if space is None:
            row, space = len(rows), capacity
            rows.append([])
        else:
            row = by_space[space].pop()
        rows[row].append((starts[i], lengths[i]))
        if max_per_row is None or len(rows[row]) < max_per_row:
            by_space[space - lengths[i]].append(row)
    return rows


class TrimmedBatches(RowBatches):
    """Padded rows in a shuffled order. Rows of similar length share a batch, and columns without targets are cut."""

    def step_data(self, step: int) -> StepData:
        """Micro-batches of at most as many tokens as `device_batch_size` whole rows have."""
        indices = self.row_indices(step)[self.world.rank :: self.world.size]
        own = sorted((self.rows[i] for i in indices), key=lambda row: trained_length(row.targets))
        lengths = [trained_length(row.targets) for row in own]
        groups = group_by_tokens(lengths, self.device_batch_size * len(own[0].tokens))
        return StepData([trim(stack(own[group])) for group in groups], {"epoch": self.epoch(step)})


def trim(batch: Batch) -> Batch:
    """Cut the columns after the last target of all rows."""
    length = padded_length(max(map(trained_length, batch.targets.numpy())))
    return Batch(batch.tokens[:, :length], batch.targets[:, :length])


def padded_length(length: int) -> int:
    """Columns of a batch whose longest row has `length` tokens: the next multiple of 8, for tensor cores.

    Multiples of 32 would mean fewer shapes, but would make training on the demo's conversations 1.15 times slower.
    """
    return max(-(-length // 8), 1) * 8


def trained_length(targets: np.ndarray) -> int:
    """Positions of one row up to the last target that is trained on."""
    return int(np.flatnonzero(targets != IGNORE).max(initial=-1)) + 1


def group_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Group rows sorted by length into batches of at most `max_tokens` tokens, padding included.

    A longer row gets a batch to itself.
    """
    starts = [0]
    for i, length in enumerate(lengths):
        if i > starts[-1] and (i + 1 - starts[-1]) * padded_length(length) > max_tokens:
            starts.append(i)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True) if start < end]
