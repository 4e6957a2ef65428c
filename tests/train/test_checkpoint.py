"""A checkpoint is whole or not there, and is found by what a user says."""

import errno
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from nanochat import paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import META_FILE, MODEL_FILE, OPTIMIZER_FILE, SUMS_FILE, Checkpoint, SaveError
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from tests.conftest import random_model
from tests.training import flip_a_byte, save

CPU = torch.device("cpu")


def test_round_trip(base_dir: Path, tokenizer: Tokenizer) -> None:
    saved = save(tokenizer)
    model = saved.load_model(CPU, torch.float32, tokenizer)
    expected = random_model(tokenizer.vocab_size).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    MuonAdamW(model, OptimizerOptions()).load_full_state(saved.load_optimizer())
    assert {path.name for path in saved.folder.iterdir()} == {MODEL_FILE, OPTIMIZER_FILE, META_FILE, SUMS_FILE}


def test_the_newest_is_found_among_odd_names(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in (9, 100, 20):
        folder = save(tokenizer, step=step).folder.parent
    for name in ("step_old", "step_999999.bak", ".step_000500.partial", "step_000700", "notes.txt"):
        (folder / name).mkdir()
    assert checkpoint.find("base").step == 100
    assert checkpoint.find("base", step=9).step == 9


def test_the_most_advanced_stage_is_taken_and_within_it_the_last_saved(base_dir: Path, tokenizer: Tokenizer) -> None:
    save(tokenizer, "base", "d9", 50)
    save(tokenizer, "sft", "d4", 30)
    save(tokenizer, "sft", "d2", 3)
    assert checkpoint.find(None).describe() == "sft d2 step 3"
    assert checkpoint.find("sft", "d4").describe() == "sft d4 step 30"
    assert checkpoint.find("base").describe() == "base d9 step 50"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None,), "./pretrain.sh"),
        (("sft",), "./sft.sh"),
        (
            ("base", "d9", 3),
            "base.*d9.*step 3.*./nanochat.sh checkpoints",
        ),
        (("best",), "base, mid, sft, rl.*best"),
    ],
)
def test_what_is_not_there_gets_a_sentence(base_dir: Path, arguments: tuple, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        checkpoint.find(*arguments)


def test_another_tokenizer_or_architecture_is_refused(base_dir: Path, tokenizer: Tokenizer) -> None:
    saved = save(tokenizer)
    other = Tokenizer.train(["some other text"] * 3, 270)
    with pytest.raises(UserError, match="tokenizer"):
        saved.load_model(CPU, torch.float32, other)
    meta = json.loads((saved.folder / META_FILE).read_text())
    (saved.folder / META_FILE).write_text(json.dumps({**meta, "architecture": "nanochat-0"}))
    with pytest.raises(UserError, match="nanochat-0"):
        Checkpoint(saved.folder).load_model(CPU, torch.float32, tokenizer)


def test_a_nanochat_1_checkpoint_keeps_its_soft_cap(base_dir: Path, tokenizer: Tokenizer) -> None:
    saved = save(tokenizer)
    meta = json.loads((saved.folder / META_FILE).read_text())
    del meta["model_config"]["logit_softcap"]
    (saved.folder / META_FILE).write_text(json.dumps({**meta, "architecture": "nanochat-1"}))
    model = Checkpoint(saved.folder).load_model(CPU, torch.float32, tokenizer)
    hidden = 1000 * torch.ones(1, model.config.n_embd)
    assert model.config.logit_softcap == 15 and model.head(hidden).abs().max() <= 15
    torch.testing.assert_close(model.head(hidden), 15 * torch.tanh(model.lm_head(hidden) / 15))


def test_a_missing_file_is_named(base_dir: Path, tokenizer: Tokenizer) -> None:
    saved = save(tokenizer)
    (saved.folder / MODEL_FILE).unlink()
    assert saved.damage() == f"{MODEL_FILE} is missing"
    (saved.folder / SUMS_FILE).unlink()
    assert saved.damage() == f"{SUMS_FILE} is missing"


@pytest.mark.parametrize("name", [SUMS_FILE, OPTIMIZER_FILE, META_FILE])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_a_pipe_or_device_is_not_read(base_dir: Path, tokenizer: Tokenizer, name: str, device: str | None) -> None:
    path = save(tokenizer).folder / name
    path.unlink()
    path.symlink_to(device) if device else os.mkfifo(path)
    assert name in str(Checkpoint(path.parent).damage())


def test_a_damaged_file_is_named(base_dir: Path, tokenizer: Tokenizer) -> None:
    saved = save(tokenizer)
    weights = saved.folder / MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=MODEL_FILE):
        saved.load_model(CPU, torch.float32, tokenizer)


def test_a_save_that_fails_leaves_the_old_and_nothing_half(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tokenizer, step=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SaveError, match="No space left on device"):
        save(tokenizer, step=2)
    assert [path.name for path in (paths.checkpoints_dir("base") / "d2").iterdir()] == ["step_000001"]


@pytest.mark.parametrize(("number", "is_saved"), [(errno.EINVAL, True), (errno.EPERM, True), (errno.EIO, False)])
def test_a_file_system_that_does_not_sync_folders_keeps_checkpoints(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, number: int, is_saved: bool
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    tokenizer.save(paths.tokenizer_dir())
    monkeypatch.setattr(os, "fsync", refuse_folders)
    if is_saved:
        assert save(tokenizer).damage() is None
    else:
        with pytest.raises(SaveError, match=os.strerror(number)):
            save(tokenizer)


def test_only_the_last_are_kept(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in (1, 2, 3):
        save(tokenizer, step=step, keep_last=2)
    assert [c.step for c in checkpoint.checkpoints(paths.checkpoints_dir("base") / "d2")] == [2, 3]


def test_a_model_that_was_set_aside_is_not_the_newest(base_dir: Path, tokenizer: Tokenizer) -> None:
    save(tokenizer, tag="d2", step=1)
    save(tokenizer, tag="aside/d4.20260101-120000", step=9)
    assert checkpoint.find("base").describe() == "base d2 step 1"
    assert checkpoint.find("base", "aside/d4.20260101-120000").step == 9


@pytest.mark.parametrize("damaged", ['{"step": 3, "sour', "{}", "[]", "\0"])
def test_a_step_with_damaged_meta_is_passed_over(base_dir: Path, tokenizer: Tokenizer, damaged: str) -> None:
    save(tokenizer, step=2)
    meta = save(tokenizer, step=3).folder / META_FILE
    meta.write_text(damaged)
    assert checkpoint.find("base").step == 2


def test_old_steps_that_cannot_be_removed_do_not_fail_the_save(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save(tokenizer, step=1, keep_last=1)
    assert save(tokenizer, step=2, keep_last=1).step == 2
    assert [c.step for c in checkpoint.checkpoints(paths.checkpoints_dir("base") / "d2")] == [2]


def test_an_unwritable_base_directory_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/proc/nowhere")
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        paths.base_dir()


@pytest.mark.parametrize("name", [MODEL_FILE, META_FILE])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(
    base_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save(tokenizer, step=1)
    damaged = save(tokenizer, step=2)
    flip_a_byte(damaged.folder / name)
    assert checkpoint.find("base").step == 1
    assert f"{damaged.folder} is damaged" in capsys.readouterr().err


def test_a_damaged_optimizer_matters_to_training_alone(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in (1, 2):
        saved = save(tokenizer, step=step)
    flip_a_byte(saved.folder / OPTIMIZER_FILE)
    assert checkpoint.find("base").step == 2
    sound, skipped = checkpoint.newest_verified("base")
    assert sound and sound.step == 1 and OPTIMIZER_FILE in skipped[0][1]


def test_a_damaged_step_that_was_asked_for_is_refused_and_so_is_a_model_with_nothing_else(
    base_dir: Path, tokenizer: Tokenizer
) -> None:
    for step in (1, 2):
        flip_a_byte(save(tokenizer, step=step).folder / MODEL_FILE)
    with pytest.raises(UserError, match=r"step_000001.*model\.safetensors"):
        checkpoint.find("base", step=1)
    with pytest.raises(UserError, match="step_000002"):
        checkpoint.find("base")


def test_sha256sum_checks_a_checkpoint(base_dir: Path, tokenizer: Tokenizer) -> None:
    folder = save(tokenizer).folder
    assert subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=folder, check=False).returncode == 0


def test_every_so_many_steps_one_is_kept_for_good(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in range(1, 8):
        save(tokenizer, step=step, keep_last=1, keep_every=3)
    assert [c.step for c in checkpoint.checkpoints(paths.checkpoints_dir("base") / "d2")] == [3, 6, 7]
