"""From documents of any length to rows of one length.

Both ways use every token of every document. A row is described by integers alone, so a run resumes at any row, and
any number of processes can share the rows out.
"""

from typing import NamedTuple, Protocol

import numpy as np

from nanochat.data.token_files import TokenFile
from nanochat.data.token_shards import TokenShards
from nanochat.model.loss import IGNORE


class Row(NamedTuple):
    """What one row of a batch is trained on."""

    tokens: np.ndarray
    """(T,) int64, opening with bos"""
    targets: np.ndarray
    """(T,) int64, the next token, or loss.IGNORE where it is not trained on"""


class Rows(Protocol):
    """A numbered set of rows."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int) -> Row:
        """Row `index`."""


class StreamRows:
    """Documents end to end, cut every `sequence_len` tokens; for text.

    Row r predicts tokens [r T, (r + 1) T) of the stream, given bos and those of them that came before: each token
    is a target exactly once, and no row depends on another.
    """

    def __init__(self, stream: TokenFile | TokenShards, sequence_len: int, bos_id: int) -> None:
        self.stream = stream
        self.sequence_len = sequence_len
        self.bos_id = bos_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""
        return len(self.stream.ids)

    def in_pieces(self, pieces_per_row: int) -> "StreamRows":
        """The same stream in shorter rows: the pieces of row i are from number i x pieces_per_row on."""
        return StreamRows(self.stream, self.sequence_len // pieces_per_row, self.bos_id)

    def __len__(self) -> int:
        """Rows, the last padded."""
        return -(-len(self.stream.ids) // self.sequence_len)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, in O(sequence_len); past the end of the stream, one that trains nothing."""
        stream = self.stream.ids[index * self.sequence_len : (index + 1) * self.sequence_len].astype(np.int64)
        tokens = np.full(self.sequence_len, self.bos_id, np.int64)
        targets = np.full(self.sequence_len, IGNORE, np.int64)
        tokens[1 : len(stream) + 1] = stream[: self.sequence_len - 1]
        targets[: len(stream)] = stream
        if len(stream) and stream[0] == self.bos_id:  # the row opens with a document: its bos is given, not predicted
            targets[0] = IGNORE
        return Row(tokens, targets)


class PackedRows:
    """Whole documents side by side, as many as fit, the rest padded; for conversations.

    `documents_per_row` 1 gives each a row of its own. A document longer than a row is cut into rows' worths.
    """

    def __init__(
        self, file: TokenFile, sequence_len: int, bos_id: int, *, learn_all: bool, documents_per_row: int | None = None
    ) -> None:
        self.file = file
        self.sequence_len = sequence_len
        self.bos_id = bos_id
        self.learn_all = learn_all or file.mask is None
        self.rows = best_fit(*_pieces(file.offsets[:], sequence_len), sequence_len, documents_per_row)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. A target is learned if the file's mask says so, or all are learned."""
        tokens = np.full(self.sequence_len, self.bos_id, np.int64)
        targets = np.full(self.sequence_len, IGNORE, np.int64)
        at = 0
        for start, length in self.rows[index]:
            piece = self.file.ids[start : start + length].astype(np.int64)
            tokens[at : at + length] = piece
            learned = piece[1:].copy()
            if not self.learn_all:
                assert self.file.mask is not None
                learned[self.file.mask[start + 1 : start + length] == 0] = IGNORE
            targets[at : at + length - 1] = learned
            at += length
        return Row(tokens, targets)


def _pieces(offsets: np.ndarray, sequence_len: int) -> tuple[list[int], list[int]]:
    """Starts and lengths of all documents, the longer than a row cut; a cut repeats a token, to predict the next."""
    starts, lengths = [], []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        while end - start > sequence_len:
            starts.append(start)
            lengths.append(sequence_len)
            start += sequence_len - 1
        starts.append(start)
        lengths.append(end - start)
    return starts, lengths


def best_fit(
    starts: list[int], lengths: list[int], capacity: int, most: int | None = None
) -> list[list[tuple[int, int]]]:
    """Best-fit packing, longest first: rows of (start, length), at most `most` to a row.

    By room left, the rows that are not full are kept in buckets: O(documents x capacity) at worst and in practice
    close to linear. Ties keep their order, so the result depends on the arguments alone.
    """
    rows: list[list[tuple[int, int]]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], capacity) if by_room[room]), None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = by_room[room].pop()
        rows[row].append((starts[i], lengths[i]))
        if most is None or len(rows[row]) < most:
            by_room[room - lengths[i]].append(row)
    return rows
