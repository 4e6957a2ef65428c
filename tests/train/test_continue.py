import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.errors import UserError
from nanochat.hub.card import _stage_data
from nanochat.report.history import newest_stages, pretraining_text
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.options import ContinueOptions, PretrainOptions
from scripts import base_train

SMALL = {"device_type": "cpu", "tracker": "none", "total_batch_size": 512, "device_batch_size": 4, "save_every": 0}


def texts(start: int) -> Callable[[], list[str]]:
    return lambda: demo_data.documents("train")[start : start + 10]


@pytest.fixture
def pretrained(base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model of one layer, and the token files of other text."""
    monkeypatch.setattr(base_train, "rebuild_report", lambda run: None)
    tokenizer.save(paths.tokenizer_dir())
    for folder, start in (("encyclopedia", 0), ("local--mybooks", 100)):
        splits = {split: [TextShard(split, "", texts(start + offset))] for split, offset in (("train", 0), ("val", 50))}
        write_shards(paths.tokens_dir(folder), splits, tokenizer, workers=1)
    (paths.tokens_dir("local--mybooks") / "source.json").write_text(json.dumps({"after": [], "license": None}))
    base_train.main(PretrainOptions(dataset=("encyclopedia",), depth=1, max_seq_len=64, num_iterations=2, **SMALL))  # type: ignore[arg-type]
    return base_dir


def test_a_base_model_continues_on_other_text(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.find("base", "d1")
    options = ContinueOptions(from_="d1", dataset=("mybooks",), num_epochs=2.0, **SMALL)  # type: ignore[arg-type]
    base_train.main(options)
    out = capsys.readouterr().out
    found = checkpoint.find("base", "d1-mybooks")
    assert found.meta["parent"] == before.identity
    assert found.meta["options"]["depth"] == 1 and found.config == before.config
    assert "mybooks" in found.meta["trained_on"] and "before training: " in out
    assert checkpoint.find("base", "d1").meta["saved_at"] == before.meta["saved_at"]
    stages = newest_stages()
    assert [stage.label for stage in stages] == ["base", "base d1-mybooks"]
    assert pretraining_text(stages) == ["mybooks"]
    assert _stage_data(stages[0]) == {"leads of Wikipedia's vital articles": "CC BY-SA 4.0"}
    with pytest.raises(UserError, match=r"license of mybooks.*\./prepare\.sh .*--license"):
        _stage_data(stages[1])
    base_train.main(options)
    assert "complete" in capsys.readouterr().out
    base_train.main(replace(options, num_epochs=4.0))
    resumed = checkpoint.find("base", "d1-mybooks")
    assert resumed.step > found.step
    assert resumed.meta["bpb_before"] == found.meta["bpb_before"]
    assert resumed.meta["trained_on"].splitlines()[-1] == found.meta["trained_on"].splitlines()[-1]


def test_a_run_is_extended_from_where_its_text_and_optimizer_ended(pretrained: Path) -> None:
    extension = ContinueOptions(from_="d1", dataset=("encyclopedia",), num_iterations=3, model_tag="longer", **SMALL)  # type: ignore[arg-type]
    base_train.main(extension)
    longer = checkpoint.find("base", "longer")
    assert longer.meta["first_row"] == 2 * 512 // 64  # after the parent's two steps
    assert int(longer.load_optimizer()["steps"]) == 2 + 3
    again = replace(extension, from_="longer", num_iterations=1, model_tag="longest")
    base_train.main(again)
    assert checkpoint.find("base", "longest").meta["first_row"] == 5 * 512 // 64


def test_the_name_of_the_continued_model_is_not_reused(pretrained: Path) -> None:
    with pytest.raises(UserError, match="--model-tag must differ from --from d1"):
        base_train.main(ContinueOptions(from_="d1", model_tag="d1", dataset=("mybooks",), **SMALL))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tagged d9"):
        base_train.main(ContinueOptions(from_="d9", dataset=("mybooks",), **SMALL))  # type: ignore[arg-type]
