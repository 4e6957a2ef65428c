import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.sources import MixedText, Source
from nanochat.data.texts import open_texts
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from scripts import prepare
from scripts.prepare import PrepareOptions
from tests.conftest import StartHub

OPTIONS = PrepareOptions(num_shards=3, vocab_size=512, tasks=False)


@pytest.fixture
def texts(base_dir: Path, start_hub: StartHub) -> list[str]:
    """A hub with four shards of 20 articles each."""
    texts = demo_data.documents("train")[:80]
    folder = base_dir / "hub" / "datasets" / "karpathy" / "fineweb-edu-100b-shuffle"
    folder.mkdir(parents=True)
    for i in range(4):
        table = pyarrow.table({"text": texts[i * 20 : i * 20 + 20]})
        pyarrow.parquet.write_table(table, folder / f"shard_{i:05d}.parquet", row_group_size=8)
    start_hub("--root", base_dir / "hub", "--cut", 2, "--fail", 3)
    return texts


def stream(split: str, name: str = "fineweb-edu") -> str:
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    return tokenizer.decode(MixedText.open([name], split, tokenizer).stream.ids[:].tolist())


def documents(name: str, split: str) -> list[str]:
    return stream(split, name).split("<|bos|>")[1:]


@pytest.fixture
def books(base_dir: Path) -> Path:
    """A folder with 60 short documents in three files, two of them alike, and one empty."""
    folder = base_dir / "my books"
    (folder / "nested").mkdir(parents=True)
    texts = demo_data.documents("train")[:60]
    for name, part in (("a", [*texts[:20], texts[0]]), ("nested/b", [*texts[20:40], ""]), ("nested/c", texts[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def expected(texts: list[str]) -> str:
    return "".join(f"<|bos|>{text}" for text in texts)


def test_text_becomes_tokens_and_more_text_keeps_the_validation(
    texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.main(OPTIONS)
    assert (stream("val"), stream("train")) == (expected(texts[:20]), expected(texts[20:60]))
    prepare.main(replace(OPTIONS, num_shards=4))
    assert (stream("val"), stream("train")) == (expected(texts[:20]), expected(texts[20:]))
    out = capsys.readouterr().out
    assert out.count("wrote 3 token files") == out.count("wrote 1 token files") == 1


def test_verify_replaces_what_is_damaged(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(OPTIONS)
    shard = paths.data_dir("fineweb-edu") / "shard_00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"\0")
    prepare.main(replace(OPTIONS, verify=True))
    assert shard.read_bytes() == whole
    assert capsys.readouterr().out.count(f"{shard} is damaged") == 1
    assert stream("train") == expected(texts[20:60])


def test_fresh_keeps_the_old_tokenizer(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = replace(prepare.DEMO, vocab_size=400, max_chars=20_000)
    corpus = open_texts(old)
    first = prepare.prepare_tokenizer(corpus, old)
    second = prepare.prepare_tokenizer(corpus, replace(old, vocab_size=500, fresh=True))
    (aside,) = base_dir.glob("tokenizer.*")
    assert f"{aside}" in capsys.readouterr().out
    assert Tokenizer.load(aside).hash == first.hash
    assert prepare.prepare_tokenizer(corpus, replace(old, vocab_size=500)).hash == second.hash


def test_an_earlier_tokenizer_is_kept_with_a_note(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(prepare.DEMO, vocab_size=400, max_chars=20_000)
    corpus = open_texts(options)
    current = prepare.prepare_tokenizer(corpus, options)
    assert "GGUF" not in capsys.readouterr().out
    two_digits = Tokenizer(current.ranks, current.pattern.replace("{1,3}", "{1,2}"))
    two_digits.save(paths.tokenizer_dir())
    assert prepare.prepare_tokenizer(corpus, options).hash == two_digits.hash
    out = capsys.readouterr().out
    assert "GGUF" in out and "--fresh" in out


def test_the_default_number_of_shards_follows_the_depth(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"has 4 files, but no shard_00004.*--num-shards"):
        prepare.main(PrepareOptions(depth=4, tasks=False))


def own(folder: Path, **options: object) -> PrepareOptions:
    return PrepareOptions(dataset=(str(folder),), vocab_size=400, tasks=False, **options)  # type: ignore[arg-type]


def test_own_text_is_divided_once_and_for_all(books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(own(books))
    out = capsys.readouterr().out
    assert "1 empty documents and 1 exact duplicates" in out and "--license" in out and "latin 100%" in out
    train, held_out = documents("my books", "train"), documents("my books", "val")
    assert sorted(train + held_out) == sorted(demo_data.documents("train")[:60])
    assert len(held_out) == 6
    more = [{"text": text} for text in demo_data.documents("train")[50:100]]
    (books / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    prepare.main(own(books))
    assert set(held_out) <= set(documents("my books", "val"))
    assert not set(held_out) & set(documents("my books", "train"))
    assert len(documents("my books", "train") + documents("my books", "val")) == 100
    assert "11 exact duplicates" in capsys.readouterr().out


def test_only_changed_parts_are_written_again(books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(own(books))
    folder = paths.tokens_dir(Source("my books").folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.ids")}
    prepare.main(own(books))
    (books / "a.jsonl").touch()
    prepare.main(own(books))
    assert capsys.readouterr().out.count("wrote") == 1
    (books / "a.jsonl").unlink()
    prepare.main(own(books))
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.ids")}
    assert kept.items() <= written.items() and 1 <= len(written) - len(kept) <= 2
    assert len(documents("my books", "train") + documents("my books", "val")) == 40


def test_several_sources_leave_out_each_other_s_documents(books: Path, base_dir: Path) -> None:
    (base_dir / "notes.jsonl").write_text((books / "a.jsonl").read_text() + '{"text": "one note"}\n{"text": "two"}')
    both = (f"{books}:0.5", f"{base_dir / 'notes.jsonl'}:0.5")
    prepare.main(PrepareOptions(dataset=both, vocab_size=400, tasks=False))
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    notes = [MixedText.open(both, split, tokenizer).parts[1].ids[:].tolist() for split in ("train", "val")]
    assert sorted(tokenizer.decode(ids) for ids in notes) == ["<|bos|>one note", "<|bos|>two"]


def test_the_tokenizer_of_other_text_is_kept_only_if_asked_for(books: Path, base_dir: Path) -> None:
    prepare.main(replace(prepare.DEMO, vocab_size=512, max_chars=20_000))
    with pytest.raises(UserError, match=r"trained on encyclopedia.*--keep-tokenizer.*--fresh"):
        prepare.main(own(books))
    prepare.main(own(books, keep_tokenizer=True))
    (paths.tokenizer_dir() / prepare.TRAINED_ON_FILE).write_text("{")
    with pytest.raises(UserError, match=r"trained_on\.json.*--keep-tokenizer"):
        prepare.main(own(books))
    assert Tokenizer.load(paths.tokenizer_dir()).vocab_size == 512
    prepare.main(own(books, fresh=True))
    assert Tokenizer.load(paths.tokenizer_dir()).vocab_size == 400


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.pdf": "x", "b.txt": ""}, r"no text in .*\.txt.*\.parquet.* 2 "),
        ({"a.txt": "  ", "b.txt": "one"}, "has 1 documents: at least 2"),
        ({"a.jsonl": '{"body": "x"}'}, "no column text, only body"),
    ],
)
def test_folders_without_enough_text(base_dir: Path, files: dict[str, str], message: str) -> None:
    folder = base_dir / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepare.main(own(folder))


def test_any_dataset_of_the_hub(
    base_dir: Path, start_hub: StartHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = base_dir / "hub" / "datasets" / "ada" / "tales"
    texts = demo_data.documents("train")[:60]
    for i in range(3):
        for config in ("de", "en"):
            (repository / config).mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({"body": [f"{config}: {text}" for text in texts[i * 20 : i * 20 + 20]]})
            pyarrow.parquet.write_table(table, repository / config / f"train-{i:05d}-of-00003.parquet")
    card = ["---", "license: cc0-1.0", "configs:"]
    for config in ("de", "en"):
        card += [f"- config_name: {config}", "  data_files:", f"  - {{split: train, path: {config}/train-*}}"]
    (repository / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", start_hub("--root", base_dir / "hub"))
    options = PrepareOptions(dataset=("ada/tales/de",), text_column=("body",), vocab_size=400, tasks=False)
    prepare.main(replace(options, num_shards=2))
    assert "2 of 3 files; license: cc0-1.0" in capsys.readouterr().out
    found = documents("ada/tales/de", "train") + documents("ada/tales/de", "val")
    assert sorted(found) == sorted(f"de: {text}" for text in texts[:40])
    assert Source("ada/tales/de").license == "cc0-1.0"
    prepare.main(replace(options, num_shards=2, license="cc-by-4.0"))
    assert Source("ada/tales/de").license == "cc-by-4.0"
    capsys.readouterr()
    prepare.main(options)
    assert "3 of 3 files" in capsys.readouterr().out
    for wrong, message in (
        ({"split": "test"}, r"no split test.*train"),
        ({"dataset": ("ada/tales/fr",)}, r"cannot use ada/tales/fr.*de"),
        ({"dataset": ("ada/nothing",)}, "cannot use ada/nothing"),
        ({"text_column": ("text",)}, "no column text, only body"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.main(replace(options, **wrong))
