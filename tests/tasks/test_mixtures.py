from pathlib import Path

import pytest

from nanochat import paths
from nanochat.conversations import find_problem
from nanochat.errors import UserError
from nanochat.tasks import identity, mixtures
from nanochat.tasks.hub_task import SmolTalk
from nanochat.tasks.spelling import Spelling, read_words, write_words
from nanochat.tasks.task import Mixture
from tests.conftest import StartHub

pytestmark = pytest.mark.usefixtures("base_dir")
WORDS = [a + b + c + d for a in "bcdfg" for b in "aeiou" for c in "lmnrst" for d in ("", "s")]


@pytest.fixture
def prepared(base_dir: Path, start_hub: StartHub) -> None:
    start_hub()
    identity.write_default(paths.identity_file())
    write_words(paths.words_file(), [" ".join(WORDS)] * 3)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("make", [mixtures.mid, mixtures.sft])
def test_the_real_mixtures_hold_valid_conversations(make: "type[Mixture]") -> None:
    mixture = make("real")  # type: ignore[arg-type]
    assert not [i for i in range(0, len(mixture), 97) if find_problem(mixture[i])]


@pytest.mark.usefixtures("prepared")
def test_row_counts_do_not_depend_on_the_number_of_words() -> None:
    counts = dict(zip((task.name for task in mixtures.mid("real").tasks), mixtures.mid("real").counts, strict=True))
    assert counts["spelling"] == 200_000
    assert counts["letter count"] == 80_000
    assert counts["smoltalk"] == len(SmolTalk("train"))


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


def test_take_repeats_a_task_in_other_words() -> None:
    task, share = mixtures.take(3 * len(WORDS), Spelling, WORDS)
    assert len(Mixture([(task, share)])) == 3 * len(WORDS)
    assert len(task) >= 3 * len(WORDS)


def test_words_are_frequent_and_lower_case(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    texts = ["Apple apple apple apple", "it's pear-tree pear pear", "rare to be of", "pear pear"]
    assert write_words(path, texts) == 2
    assert read_words(path) == ["pear", "apple"]
    assert write_words(path, ["other other other"]) == 2  # not made again: spelling stays split as it was


def test_missing_words_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"words\.txt .*prepare\.sh"):
        read_words(paths.words_file())
