"""The real huggingface_hub client against a hub on loopback."""

import shutil
from pathlib import Path

import pytest

from nanochat.errors import UserError
from scripts import hf_upload
from scripts.hf_upload import Options
from tests.hub.fake_hub import FakeHub, Repository, StoredFile

NAME = "ada/nanochat-d2-sft"


@pytest.fixture
def prepared(exported: Path, tmp_path: Path) -> Path:
    """A folder with one prepared model that a test may change."""
    shutil.copytree(exported, tmp_path / "out" / exported.name)
    return tmp_path / "out"


def upload(prepared: Path, **options: object) -> None:
    hf_upload.main(Options(**{"username": "ada", "folder": prepared, **options}))  # type: ignore[arg-type]  # a test's


def contents(prepared: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (prepared / "nanochat-d2-sft").iterdir()}


def test_every_file_arrives(hub: FakeHub, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload(prepared)
    assert hub.files(NAME) == contents(prepared)
    assert f"{hub.address}/{NAME}" in capsys.readouterr().out
    assert not hub.repositories[NAME].private


def test_a_dry_run_tells_sizes_and_asks_nobody(
    hub: FakeHub, prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    upload(prepared, dry_run=True)
    output = capsys.readouterr().out
    assert all(name in output for name in contents(prepared))
    assert not hub.requests


def test_again_sends_only_what_changed(hub: FakeHub, prepared: Path) -> None:
    upload(prepared)
    upload(prepared)
    assert len(hub.commits) == 1 and len(hub.received) == 1
    (prepared / "nanochat-d2-sft" / "LICENSE").write_text("another\n")
    upload(prepared)
    assert hub.commits[1:] == [["LICENSE"]] and len(hub.received) == 1
    assert hub.files(NAME) == contents(prepared)


def test_a_cut_connection_is_outlived_by_the_next_run(hub: FakeHub, prepared: Path) -> None:
    (prepared / "nanochat-d2-sft" / "training.png").write_bytes(b"picture" * 1000)
    hub.cut_above = 100_000
    with pytest.raises(UserError, match="again"):
        upload(prepared)
    assert hub.files(NAME) == {} and hub.received == [7000]
    hub.cut_above = None
    upload(prepared)
    assert hub.files(NAME) == contents(prepared)
    sizes = [len(contents(prepared)[name]) for name in ("model.safetensors", "training.png")]
    assert sorted(hub.received) == sorted(sizes)  # each file arrived once


def test_a_hub_that_is_busy_for_a_while_is_waited_for(hub: FakeHub, prepared: Path) -> None:
    hub.failures = 3
    upload(prepared)
    assert hub.failures == 0 and hub.files(NAME) == contents(prepared)


def test_an_outdated_shard_does_not_stay(hub: FakeHub, prepared: Path) -> None:
    upload(prepared)
    hub.repositories[NAME].branches["main"]["model-00001-of-00002.safetensors"] = StoredFile(b"old", True)
    upload(prepared)
    assert hub.files(NAME) == contents(prepared)


def test_what_arrived_is_compared(hub: FakeHub, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(prepared)
    weights = hub.repositories[NAME].branches["main"]["model.safetensors"]
    damaged = StoredFile(weights.content[:-1] + bytes([weights.content[-1] ^ 1]), True)
    monkeypatch.setattr(StoredFile, "oid", weights.sha256)  # the hub says that nothing changed
    hub.repositories[NAME].branches["main"]["model.safetensors"] = damaged
    with pytest.raises(UserError, match=r"model\.safetensors"):
        upload(prepared)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("", "hf auth login"),
        ("hf_wrong", "token"),
        ("hf_read", "token.*read|read.*token"),
    ],
)
def test_without_the_right_login_nothing_begins(
    hub: FakeHub, prepared: Path, monkeypatch: pytest.MonkeyPatch, token: str, sentence: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=sentence):
        upload(prepared)
    assert not hub.repositories


def test_another_s_account_is_refused(hub: FakeHub, exported: Path, tmp_path: Path) -> None:
    for account, sentence in (("bob", "bob"), ("lab", "read")):
        folder = tmp_path / account / exported.name
        shutil.copytree(exported, folder)
        card = folder / "README.md"
        card.write_text(card.read_text().replace("ada/nanochat", f"{account}/nanochat"))
        with pytest.raises(UserError, match=sentence):
            upload(folder.parent, username=account)


def test_a_card_that_names_another_repository_is_refused(hub: FakeHub, prepared: Path) -> None:
    (prepared / "nanochat-d2-sft").rename(prepared / "renamed")
    with pytest.raises(UserError, match=r"ada/nanochat-d2-sft.*ada/renamed.*hf_prepare\.sh"):
        upload(prepared)


def test_what_is_prepared_for_others_stays_here(hub: FakeHub, prepared: Path) -> None:
    folder = shutil.copytree(prepared / "nanochat-d2-sft", prepared / "nanochat-d2-rl")
    (folder / "README.md").write_text(
        (folder / "README.md").read_text().replace("ada/nanochat-d2-sft", "bob/nanochat-d2-rl")
    )
    upload(prepared)
    assert set(hub.repositories) == {NAME}


def test_a_name_that_is_taken_is_left_alone(hub: FakeHub, prepared: Path) -> None:
    theirs = StoredFile(b"---\nlicense: mit\n---\nanother model\n", False)
    hub.repositories[NAME] = Repository(branches={"main": {"README.md": theirs}})
    with pytest.raises(UserError, match="ada/nanochat-d2-sft"):
        upload(prepared)
    assert list(hub.files(NAME)) == ["README.md"] and not hub.commits


def test_private_and_never_into_a_public_repository(hub: FakeHub, prepared: Path) -> None:
    upload(prepared, private=True)
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    with pytest.raises(UserError, match="public"):
        upload(prepared, private=True)


def test_a_branch(hub: FakeHub, prepared: Path) -> None:
    upload(prepared, revision="trial")
    assert hub.files(NAME, "trial") == contents(prepared) and hub.files(NAME) == {}


def test_only_the_stage_asked_for(hub: FakeHub, prepared: Path) -> None:
    with pytest.raises(UserError, match=r"rl.*hf_prepare\.sh --author ada"):
        upload(prepared, stage="rl")
