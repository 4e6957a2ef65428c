"""A batch is a function of the step, whoever asks."""

import numpy as np
import torch

from nanochat.data.batches import RowBatches, Share, stack
from nanochat.data.packing import Row
from nanochat.loss import IGNORE


class NumberedRows:
    """Row i holds i everywhere."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Row:
        return Row(np.full(4, index), np.full(4, index))


def source(rank: int = 0, world_size: int = 1, device_batch_size: int = 3) -> RowBatches:
    share = Share(rank, world_size)
    return RowBatches(NumberedRows(), rows_per_step=4, device_batch_size=device_batch_size, share=share, seed=7)


def rows_of(batches: RowBatches, step: int) -> list[int]:
    return [int(row[0]) for batch in batches.step_data(step).batches for row in batch.tokens]


def test_an_epoch_shows_every_row_once_and_epochs_differ() -> None:
    seen = [row for step in range(5) for row in rows_of(source(), step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_the_same_step_gives_the_same_rows_at_any_time() -> None:
    used = source()
    for step in (0, 1, 2):
        rows_of(used, step)
    assert rows_of(used, 1) == rows_of(source(), 1)


def test_processes_share_a_step_without_overlap() -> None:
    for step in range(6):
        parts = [rows_of(source(rank, 2), step) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(rows_of(source(), step))


def test_micro_batches_hold_at_most_the_device_batch_size() -> None:
    assert [len(batch.tokens) for batch in source(device_batch_size=3).step_data(0).batches] == [3, 1]


def test_trimming_drops_columns_nothing_is_learned_in() -> None:
    targets = np.full(100, IGNORE)
    targets[:40] = 5
    batch = stack([Row(np.zeros(100, np.int64), targets)], trim=True)
    assert batch.tokens.shape == (1, 64) and torch.equal(batch.targets[0, :40], torch.full((40,), 5))
    assert stack([Row(np.zeros(100, np.int64), np.full(100, IGNORE))], trim=True).tokens.shape == (1, 32)
