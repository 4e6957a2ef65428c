"""mixtures.yaml is the data of every stage; --add and --task change it for one run."""

import json
from pathlib import Path

import pytest
import yaml

from nanochat import conversation_files, paths
from nanochat.conversation_files import find_problem
from nanochat.conversations import conversation
from nanochat.errors import UserError
from nanochat.tasks import identity, mixtures
from nanochat.tasks.hub_task import HubConversations, SmolTalk
from nanochat.tasks.mixtures import load_mixture, load_task
from nanochat.tasks.spelling import Spelling, read_words, write_words
from nanochat.tasks.task import Mixture
from tests.conftest import StartHub

pytestmark = pytest.mark.usefixtures("base_dir")
WORDS = [a + b + c + d for a in "bcdfg" for b in "aeiou" for c in "lmnrst" for d in ("", "s")]
TALKS = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(10)]


@pytest.fixture
def prepared(base_dir: Path, start_hub: StartHub) -> None:
    start_hub()
    identity.write_default(paths.identity_file())
    write_words(paths.words_file(), [" ".join(WORDS)] * 3)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """A file of ten conversations."""
    conversation_files.append(tmp_path / "my talks.jsonl", TALKS)
    return tmp_path / "my talks.jsonl"


def write_sheet(text: str) -> None:
    paths.mixtures_file().write_text(text)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("stage", ["mid", "sft", "rl"])
def test_the_default_mixtures_hold_valid_conversations(stage: str) -> None:
    mixture = load_mixture(stage)
    assert not [i for i in range(0, len(mixture), 97) if find_problem(mixture[i])]
    assert yaml.safe_load(str(mixture))[stage] == yaml.safe_load(paths.mixtures_file().read_text())[stage]


@pytest.mark.usefixtures("prepared")
def test_row_counts_do_not_depend_on_the_number_of_words() -> None:
    mixture = load_mixture("mid")
    counts = dict(zip((task.name for task in mixture.tasks), mixture.counts, strict=True))
    assert counts["spelling"] == 200_000
    assert counts["letter count"] == 80_000
    assert counts["smoltalk"] == len(SmolTalk("train"))


def test_the_demo_has_a_mixture_without_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DEMO", "1")
    mixture = load_mixture("rl")
    assert [task.name for task in mixture.tasks] == ["arithmetic", "word problems"]


@pytest.mark.usefixtures("prepared")
def test_different_mixtures_have_different_fingerprints() -> None:
    talk = SmolTalk("train")
    prints = {
        Mixture(tasks, seed=seed).fingerprint
        for tasks, seed in (
            ([talk], 0),
            ([talk], 1),
            ([(talk, 0.5)], 0),
            ([SmolTalk("test")], 0),
            ([Spelling(WORDS, "train")], 0),
            ([Spelling(WORDS[:-1], "train")], 0),
        )
    }
    assert len(prints) == 6
    assert Mixture([SmolTalk("train")]).fingerprint in prints


def test_added_files_are_weighted_and_override_the_sheet(talks: Path) -> None:
    write_sheet("sft:\n  refusals: 1\n")
    mixture = load_mixture("sft", [f"{talks}:2.5", "refusals:10 rows"])
    assert mixture.counts == [10, 25]
    assert load_mixture("sft", [str(talks)], only=True).counts == [10]
    assert {str(row["messages"][0]["content"]) for row in load_mixture("sft", [str(talks)], only=True)} == {
        str(row["messages"][0]["content"]) for row in TALKS
    }


def test_the_printed_table_can_be_pasted_into_the_sheet(talks: Path) -> None:
    write_sheet("sft:\n  refusals: 1\n")
    mixture = load_mixture("sft", [f"{talks}:3"])
    write_sheet(str(mixture))
    assert load_mixture("sft").fingerprint == mixture.fingerprint


def test_names_of_files_in_the_sheet_are_relative_to_it(talks: Path) -> None:
    write_sheet(f"mid:\n  {talks.name}: 2\nsft:\n")
    assert load_mixture("mid").counts == [20]
    with pytest.raises(UserError, match="sft has no training data"):
        load_mixture("sft")


@pytest.mark.parametrize("weight", ["0", "-1", "many", "nan", "inf", "", "1001", "0 rows", "1.5 rows", "-3 rows"])
def test_a_wrong_weight_is_named(talks: Path, weight: str) -> None:
    with pytest.raises(UserError, match=r"weight of .*my talks.jsonl must be above 0") as raised:
        load_mixture("sft", [f"{talks}:{weight}"], only=True)
    assert str(raised.value).endswith(f"got {weight}")


@pytest.mark.parametrize(
    ("sheet", "reason"),
    [
        ("sft: [", "cannot read"),
        ("- sft", "must list names"),
        ("sft: many", "must list names"),
        ("", "must list names"),
        ("chat:\n  refusals: 1", "stage 'chat'"),
        ("sft:\n  smalltalk: 1", "smalltalk is not a file"),
        ("sft:\n  mine.jsonl: 1", r"mine\.jsonl is not a file"),
        ("sft:\n  refusals:", "weight of refusals must be"),
        ("sft:\n  refusals: true", "weight of refusals must be"),
        ("sft:\n  refusals: 0.0001", "leave no rows"),
    ],
)
def test_a_wrong_sheet_is_a_user_error(sheet: str, reason: str) -> None:
    write_sheet(sheet)
    with pytest.raises(UserError, match=reason):
        load_mixture("sft")
    assert paths.mixtures_file().read_text() == sheet


@pytest.mark.parametrize("name", ["", ":", ":2"])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"--add and --task need a file"):
        load_mixture("sft", [name], only=True)


def test_rl_needs_graders(talks: Path) -> None:
    with pytest.raises(UserError, match=r'line 1 .*"grader"'):
        load_mixture("rl", [str(talks)], only=True)
    with pytest.raises(UserError, match="refusals has no grader"):
        load_mixture("rl", ["refusals"], only=True)


def test_a_dataset_of_the_hub_is_read_in_any_format_and_invalid_rows_are_counted(
    start_hub: StartHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}."}]} for i in range(5)
    ]
    rows.insert(2, {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi!"}]})
    folder = tmp_path / "hub/datasets/ada/chats"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", start_hub("--root", tmp_path / "hub"))
    task = load_task("ada/chats", graded=False)
    assert isinstance(task, HubConversations)
    assert list(task) == [conversation(f"{i}?", f"{i}.") for i in range(5)]
    assert "1 of 6 rows of ada/chats are invalid (row 2: message 1 is from the assistant" in capsys.readouterr().out
    with pytest.raises(UserError, match="ada/nothing"):
        load_task("ada/nothing", graded=False)


def test_words_are_frequent_and_lower_case(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    texts = ["Apple apple apple apple", "it's pear-tree pear pear", "rare to be of", "pear pear"]
    assert write_words(path, texts) == 2
    assert read_words(path) == ["pear", "apple"]
    assert write_words(path, ["other other other"]) == 2  # not made again: spelling stays split as it was


def test_missing_words_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"words\.txt .*prepare\.sh"):
        read_words(paths.words_file())


def test_the_sheet_is_written_once(base_dir: Path) -> None:
    assert mixtures.write_default() == base_dir / "mixtures.yaml"
    write_sheet("sft:\n")
    mixtures.write_default()
    assert paths.mixtures_file().read_text() == "sft:\n"
