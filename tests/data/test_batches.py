"""A batch is a function of the step, whoever asks."""

import numpy as np
import torch

from nanochat.data.batches import BatchSource, Row, RowBatches, StreamRows, stack, text_batches
from nanochat.data.packing import group_by_tokens, trim
from nanochat.data.token_files import ShardedIds, TokenShards
from nanochat.dist import World
from nanochat.model.loss import IGNORE


class NumberedRows:
    """Row i holds i everywhere."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Row:
        return Row(np.full(4, index), np.full(4, index))


def source(rank: int = 0, world_size: int = 1, device_batch_size: int = 3) -> RowBatches:
    world = World(rank, world_size)
    return RowBatches(NumberedRows(), rows_per_step=4, device_batch_size=device_batch_size, world=world, seed=7)


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


def test_an_extension_begins_after_the_rows_already_read() -> None:
    extended = RowBatches(NumberedRows(), rows_per_step=4, device_batch_size=8, world=World(), seed=7, first_row=8)
    assert extended.row_indices(0) == source().row_indices(2)
    assert extended.epoch(0) == source().epoch(2)


def test_processes_share_a_step_without_overlap() -> None:
    for step in range(6):
        parts = [rows_of(source(rank, 2), step) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(rows_of(source(), step))


def test_micro_batches_hold_at_most_the_device_batch_size() -> None:
    assert [len(batch.tokens) for batch in source(device_batch_size=3).step_data(0).batches] == [3, 1]


def test_short_rows_share_a_batch_up_to_its_tokens() -> None:
    lengths = [1, 8, 8, 9, 30, 64, 200]
    # Padded: 8, 8, 8 and 16 make 4 x 16 tokens; 32 and 64 would make 2 x 64; 200 is longer than all.
    assert group_by_tokens(lengths, 64) == [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    assert group_by_tokens(lengths, 10_000) == [slice(0, 7)]
    assert group_by_tokens([], 64) == []


def test_trimming_drops_columns_nothing_is_learned_in() -> None:
    targets = np.full(100, IGNORE)
    targets[:40] = 5
    batch = trim(stack([Row(np.zeros(100, np.int64), targets)]))
    assert batch.tokens.shape == (1, 40) and torch.equal(batch.targets[0, :40], torch.full((40,), 5))
    assert trim(stack([Row(np.zeros(100, np.int64), np.full(100, IGNORE))])).tokens.shape == (1, 8)


SHORT_STEPS = 70
"""more than are shuffled together"""


def numbered_text(rank: int = 0, world_size: int = 1) -> BatchSource:
    """Token i of the text is i; 100 steps of 6 rows of 8 go through all of it but for the end of a row."""
    rows = StreamRows(TokenShards(ShardedIds([np.arange(6 * 8 * 100 - 5, dtype=np.uint16)]), 1, 0), 8, bos_id=0)
    return text_batches(
        rows, SHORT_STEPS / 100, 100, rows_per_step=6, device_batch_size=4, world=World(rank, world_size), seed=7
    )


def targets_of(batches: BatchSource, step: int) -> list[int]:
    found = torch.cat([batch.targets.flatten() for batch in batches.step_data(step).batches])
    return found[found != IGNORE].tolist()


def test_short_rows_come_first_and_each_token_once() -> None:
    text = numbered_text()
    shapes = [[tuple(batch.tokens.shape) for batch in text.step_data(step).batches] for step in (0, 69, 70, 99)]
    assert shapes == [[(16, 2), (8, 2)], [(16, 2), (8, 2)], [(4, 8), (2, 8)], [(4, 8), (2, 8)]]
    seen = [target for step in range(100) for target in targets_of(text, step)]
    assert sorted(seen) == list(range(1, 6 * 8 * 100 - 5))


def test_the_short_rows_of_a_step_are_from_many_places() -> None:
    rows = {target // 8 for target in targets_of(numbered_text(), 3)}
    assert len(rows) > 15  # of 24 pieces; whole rows would be 6


def test_processes_share_short_rows_without_overlap() -> None:
    for step in (0, 65, 80):
        parts = [targets_of(numbered_text(rank, 2), step) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(targets_of(numbered_text(), step))
