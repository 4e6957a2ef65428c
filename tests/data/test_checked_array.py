"""Damaged files are reported when they are read, not earlier."""

from pathlib import Path

import numpy as np
import pytest

from nanochat.data.token_files import BLOCK_BYTES, CheckedArray, checksums
from nanochat.errors import UserError

LENGTH = 5 * BLOCK_BYTES // 4 + 3  # of uint16: two whole blocks and a part


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.ids"
    np.random.default_rng(0).integers(0, 1 << 16, LENGTH, dtype=np.uint16).tofile(path)
    return path


def opened(file: Path, sums: list[int]) -> CheckedArray:
    return CheckedArray(file, np.dtype(np.uint16), LENGTH, sums)


def test_slices_are_those_of_the_file(file: Path) -> None:
    array, expected = opened(file, checksums(file)), np.fromfile(file, np.uint16)
    edge = BLOCK_BYTES // 2
    for start, stop in [(0, 5), (edge - 3, edge + 3), (0, LENGTH), (LENGTH - 2, LENGTH + 9), (7, 7), (LENGTH, 1)]:
        assert array[start:stop].tolist() == expected[start:stop].tolist()
    with pytest.raises(ValueError, match="without a step"):
        array[::2]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_damaged_block_is_named_and_the_others_can_be_read(file: Path, block: int) -> None:
    sums = checksums(file)
    with file.open("r+b") as damaged:
        damaged.seek(block * BLOCK_BYTES + 1)
        byte = damaged.read(1)[0]
        damaged.seek(-1, 1)
        damaged.write(bytes([byte ^ 0x10]))
    array = opened(file, sums)
    for other in {0, 1, 2} - {block}:
        start = other * BLOCK_BYTES // 2
        assert len(array[start : start + 2]) == 2
    for _ in range(2):  # and not just the first time
        with pytest.raises(UserError, match=rf"train\.ids.*{block * BLOCK_BYTES:,}"):
            array[block * BLOCK_BYTES // 2 : block * BLOCK_BYTES // 2 + 1]


def test_a_file_that_is_cut_short_or_gone_is_named_at_once(file: Path) -> None:
    sums = checksums(file)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train.ids is damaged"):
        opened(file, sums)
    file.unlink()
    with pytest.raises(UserError, match=r"train.ids is damaged"):
        opened(file, sums)
