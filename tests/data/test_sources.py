import json
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.amount import MAX_EPOCHS, fit, shards_for_depth, tokens_for_depth
from nanochat.data.sources import MixedText, Source, parse
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("base_dir")


def prepared(tokenizer: Tokenizer, name: str, count: int) -> list[int]:
    """Write the token files of `count` articles, alike for both splits; return the ids."""
    texts = demo_data.documents("train")[:count]
    splits = {split: [TextShard(f"a.{split}", name, lambda: texts)] for split in ("train", "val")}
    write_shards(paths.tokens_dir(Source(name).folder), splits, tokenizer, workers=1)
    return [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]


def test_shards_for_depth() -> None:
    # 11 tokens for each of d20's 435M matrix and head parameters, at 4.6 characters, are 88 shards of 250M and a tenth.
    assert shards_for_depth(20, 32768) == 104
    assert [shards_for_depth(depth, 32768) for depth in (4, 12, 32)] == [8, 32, 376]


def test_too_little_text_names_the_depth_that_fits() -> None:
    tokens = tokens_for_depth(4, 4096)
    assert fit(tokens / MAX_EPOCHS, 4, 4096) is None
    assert "--depth 4" in str(fit(tokens / MAX_EPOCHS, 8, 4096))
    assert "100 epochs" in str(fit(tokens / 100, 4, 4096))


def test_names_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mybooks", "odd:0.3", "a b"):
        (tmp_path / folder).mkdir()
    assert parse(["./mybooks/"]) == [Source("mybooks", None, tmp_path / "mybooks")]
    assert parse(["fineweb-edu:0.7", "mybooks:3"]) == [
        Source("fineweb-edu", 0.7), Source("mybooks", 3.0, tmp_path / "mybooks")
    ]  # fmt: skip
    assert parse(["odd:0.3"])[0] == Source("odd:0.3", None, tmp_path / "odd:0.3")
    assert parse(["./odd:0.3:0.5", "a b:0.5"])[0] == Source("odd:0.3", 0.5, tmp_path / "odd:0.3")
    (hub,) = parse(["owner/name/config@v1"])
    assert (hub.repository, hub.folder) == ("owner/name", "owner--name--config@v1")
    assert parse("encyclopedia") == [Source("encyclopedia")]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["fineweb-edu:0"], "above 0, got 0"),
        (["fineweb-edu:-1", "climbmix:1"], "above 0, got -1"),
        (["fineweb-edu:nan"], "above 0, got nan"),
        (["fineweb-edu:0.5", "climbmix"], "weight for every name"),
        (["climbmix", "climbmix"], "different names"),
        (["./nowhere"], r"exists, got \./nowhere"),
        (["climbmicks"], "fineweb-edu, climbmix.* got climbmicks"),
    ],
)
def test_mistakes_in_names(specs: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(specs)


def test_a_mixture_has_the_asked_for_shares_and_loses_nothing(tokenizer: Tokenizer) -> None:
    large, small = prepared(tokenizer, "climbmix", 40), prepared(tokenizer, "encyclopedia", 3)
    alone = MixedText.open(["climbmix"], "train", tokenizer).stream
    assert alone.ids[:].tolist() == large
    together = MixedText.open(["climbmix", "encyclopedia"], "train", tokenizer).stream
    assert together.ids[:].tolist() == large + small
    weighted = MixedText.open(["climbmix:0.6", "encyclopedia:0.4"], "train", tokenizer)
    ids = weighted.stream.ids[:].tolist()
    assert ids[: len(large)] == large
    assert len(ids) == pytest.approx(len(large) / 0.6, abs=1)
    assert ids[len(large) : len(large) + 2 * len(small)] == small * 2
    few = MixedText.open(["climbmix:0.6", "encyclopedia:0.4"], "val", tokenizer, 100).stream.ids
    assert few[:].tolist() == large[:60] + small[:40]


def test_a_source_that_is_not_prepared_or_prepared_otherwise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mybooks").mkdir()
    name = str(tmp_path / "mybooks")
    with pytest.raises(UserError, match=rf"no tokens of mybooks .*\./prepare\.sh --dataset {name}"):
        MixedText.open([name], "train", tokenizer)
    prepared(tokenizer, "mybooks", 3)
    record = paths.tokens_dir("local--mybooks") / "source.json"
    record.write_text(json.dumps({"location": "/elsewhere/mybooks", "after": []}))
    with pytest.raises(UserError, match="made from /elsewhere/mybooks"):
        MixedText.open([name], "train", tokenizer)
    record.write_text(json.dumps({"location": name, "after": ["notes"]}))
    with pytest.raises(UserError, match="other sources"):
        MixedText.open(["mybooks"], "train", tokenizer)
    assert MixedText.open(["mybooks"], "val", tokenizer).stream.num_documents == 3
