"""Checkpoints are written in the background, and a failed save leaves everything else intact."""

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat.train import checkpoint
from nanochat.train.checkpoint import META_FILE, MODEL_FILE, Checkpoint, CheckpointWriter, checkpoints

META = {"source": "base", "tag": "d2"}


def state(value: float, count: int = 1000) -> dict[str, Tensor]:
    return {"weight": torch.full((count,), value)}


def saved_value(checkpoint: Checkpoint) -> float:
    assert checkpoint.damage() is None
    return float(checkpoint.load_optimizer()["weight"][0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be larger than 64 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_state_may_change_as_soon_as_saving_has_begun(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep_last=9, keep_every=0) as writer:
        changing = state(0.0, 1 << 20)
        for step in (1, 2, 3):
            writer.start(step, changing, changing, META)
            changing["weight"] += 1
    assert [saved_value(checkpoint) for checkpoint in checkpoints(tmp_path)] == [0.0, 1.0, 2.0]


def test_on_a_full_disk_the_older_checkpoint_stays_and_saving_goes_on_once_there_is_room(small_disk: Path) -> None:
    writer = CheckpointWriter(small_disk, keep_last=1, keep_every=0)
    writer.start(1, state(1.0), state(1.0), META)
    assert writer.finish() is None
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(900_000))
    writer.start(2, state(2.0, 100_000), state(2.0, 100_000), META)
    failure = writer.finish()
    assert failure and "step 2" in failure and "No space left on device" in failure
    assert {path.name for path in small_disk.iterdir()} == {"step_000001", "ballast"}
    assert writer.failure() is None  # reported once
    ballast.unlink()
    writer.start(3, state(3.0), state(3.0), META)
    assert writer.finish() is None
    (kept,) = checkpoints(small_disk)
    assert kept.step == 3 and saved_value(kept) == 3.0


def test_a_file_that_may_not_grow_fails_the_save_alone(tmp_path: Path, small_files: None) -> None:
    checkpoint.write(tmp_path, 1, state(1.0), state(1.0), META)
    with pytest.raises(checkpoint.SaveError, match=r"step 2.*File too large"):
        checkpoint.write(tmp_path, 2, state(2.0, 100_000), state(2.0), META)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_what_a_killed_run_left_half_written_is_removed_and_never_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, state(1.0), state(1.0), META)
    half = tmp_path / ".step_000002.partial"
    half.mkdir()
    (half / MODEL_FILE).write_bytes(b"half")
    (tmp_path / ".step_000000.old").mkdir()
    assert [c.step for c in checkpoints(tmp_path)] == [1]
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_step_taken_again_replaces_its_damaged_checkpoint(tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path, 1, state(1.0), state(1.0), META)
    (first.folder / META_FILE).write_text("{")
    assert saved_value(checkpoint.write(tmp_path, 1, state(2.0), state(2.0), META)) == 2.0
