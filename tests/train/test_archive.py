"""Listing, verifying, pruning, archiving and restoring checkpoints."""

import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.train import archive, checkpoint
from nanochat.train.checkpoint import MODEL_FILE
from scripts import checkpoints as script
from tests.training import flip_a_byte, save


def listed() -> list[tuple[str, str, int]]:
    return [(source, tag, checkpoint.step) for source, tag, checkpoint in script.all_saved()]


def test_the_list_includes_models_set_aside_and_marks_damage(
    base_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tokenizer, "sft", "d2", 7)
    save(tokenizer, "base", "aside/d2.20260101-120000", 4)
    flip_a_byte(save(tokenizer, "base", "d2", 3).folder / MODEL_FILE)
    assert listed() == [("base", "aside/d2.20260101-120000", 4), ("base", "d2", 3), ("sft", "d2", 7)]
    script.main(script.Options())
    out = capsys.readouterr().out
    assert out.count("good") == 2 and out.count("damaged") == 1 and "model.safetensors" in out
    with pytest.raises(UserError, match="1 of 3 "):
        script.main(script.Options(script.Verify()))


def test_pruning_keeps_the_last_good_ones_of_each_model(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in (1, 2, 3, 4):
        saved = save(tokenizer, step=step)
    flip_a_byte(saved.folder / MODEL_FILE)
    save(tokenizer, "mid", step=9)
    script.main(script.Options(script.Prune(keep_last=1, keep_every=2)))
    assert listed() == [("base", "d2", 2), ("base", "d2", 3), ("mid", "d2", 9)]


def test_a_model_whose_checkpoints_are_all_damaged_is_not_pruned(base_dir: Path, tokenizer: Tokenizer) -> None:
    for step in (1, 2):
        flip_a_byte(save(tokenizer, step=step).folder / MODEL_FILE)
    assert archive.prune(None, None, 1, 0) == []


def test_an_archive_is_restored_in_another_base_directory(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(paths.tokenizer_dir())
    saved = save(tokenizer, step=5)
    (saved.folder.parent / "metrics.jsonl").write_text('{"step": 5}\n')
    file = archive.archive(None, None, None, base_dir / "model.tar")
    with pytest.raises(UserError, match="--file"):
        archive.archive(None, None, None, file)
    with pytest.raises(UserError, match="already exists"):
        archive.restore(file)
    elsewhere = base_dir / "elsewhere"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(elsewhere))
    restored = archive.restore(file)
    assert restored.damage() is None and checkpoint.find("base").step == 5
    assert Tokenizer.load(paths.tokenizer_dir()).hash == tokenizer.hash
    assert (restored.folder.parent / "metrics.jsonl").exists()
    assert not list(elsewhere.glob(".restoring*"))


def test_an_archive_that_is_damaged_or_of_another_tokenizer_is_refused(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(paths.tokenizer_dir())
    save(tokenizer)
    file = archive.archive("base", "d2", 1, base_dir / "model.tar")
    cut, flipped = base_dir / "cut.tar", base_dir / "flipped.tar"
    cut.write_bytes(file.read_bytes()[:100_000])
    flipped.write_bytes(file.read_bytes())
    with flipped.open("r+b") as damaged:  # its first megabyte is weights or optimizer
        damaged.seek(1 << 20)
        damaged.write(b"not what was there")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir / "elsewhere"))
    with pytest.raises(UserError, match=r"cut\.tar"):
        archive.restore(cut)
    with pytest.raises(UserError, match=r"the checkpoint in .* is damaged"):
        archive.restore(flipped)
    Tokenizer.train(["some other text"] * 3, 270).save(paths.tokenizer_dir())
    with pytest.raises(UserError, match=r"tokenizer.*NANOCHAT_BASE_DIR"):
        archive.restore(file)


def archived(base_dir: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(paths.tokenizer_dir())
    folder = save(tokenizer).folder.parent
    (folder / "run.json").write_text('{"tag": "d2"}')
    return archive.archive(None, None, None, base_dir / "model.tar")


def repacked(file: Path, change: Callable[[Path], object]) -> Path:
    """A copy of an archive after `change` of its folder."""
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(file) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python 3.11.2 has none
            tar.extractall(temporary)
        change(Path(temporary))
        with tarfile.open(file.with_name("changed.tar"), "w") as tar:
            for entry in Path(temporary).iterdir():
                tar.add(entry, entry.name)
    return file.with_name("changed.tar")


@pytest.mark.parametrize(
    "change",
    [
        lambda at: (at / "base_checkpoints/d2").rename(at / "base_checkpoints/<b>"),
        lambda at: (at / "base_checkpoints/d2").rename(at / "base_checkpoints/.hidden"),
        lambda at: (at / "base_checkpoints/d2").rename(at / "base_checkpoints/aside"),
        lambda at: (at / "base_checkpoints").rename(at / "mid_checkpoints"),
        lambda at: (at / "base_checkpoints").rename(at / "evil_checkpoints"),
        lambda at: (at / "base_checkpoints/d2/step_000001").rename(at / "base_checkpoints/d2/step_x"),
        lambda at: (at / "base_checkpoints/d2/run.json").write_text('{"tag": "<script>"}'),
        lambda at: (at / "base_checkpoints/d2/run.json").unlink(),
        lambda at: (at / "base_checkpoints/d2/SHA256SUMS").write_text("damaged"),
        lambda at: (at / "base_checkpoints/d2/more").symlink_to("step_000001"),
        lambda at: os.mkfifo(at / "base_checkpoints/d2/more"),
    ],
)
def test_an_archive_with_odd_names_or_changed_logs_is_refused(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    changed = repacked(archived(base_dir, tokenizer), change)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir / "elsewhere"))
    with pytest.raises(UserError, match=r"changed\.tar"):
        archive.restore(changed)
    with pytest.raises(UserError, match="not a file"):
        archive.restore(base_dir)
    assert not list((base_dir / "elsewhere").rglob("*"))


def test_logs_without_checksums_are_not_restored(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = repacked(archived(base_dir, tokenizer), lambda at: (at / "base_checkpoints/d2/SHA256SUMS").unlink())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir / "elsewhere"))
    assert [entry.name for entry in archive.restore(changed).folder.parent.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("has_filters", [True, False])
@pytest.mark.parametrize("name", ["../outside", "base_checkpoints/../../outside", "{base}/outside"])
def test_nothing_is_written_outside_even_by_a_python_without_filters(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, has_filters: bool
) -> None:
    file = archived(base_dir, tokenizer)
    outside = file.with_name("outside.tar")
    with tarfile.open(file) as tar, tarfile.open(outside, "w") as changed:
        for member in tar:
            changed.addfile(member, tar.extractfile(member) if member.isfile() else None)
        entry = tarfile.TarInfo(name.format(base=base_dir))
        changed.addfile(entry)
    if not has_filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elsewhere = base_dir / "elsewhere"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(elsewhere))
    with pytest.raises(UserError, match=r"outside\.tar"):
        archive.restore(outside)
    assert not list(elsewhere.rglob("*")) and not list(base_dir.glob("outside"))
    assert archive.restore(file).damage() is None
