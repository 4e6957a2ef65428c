from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.token_files import TokenShards
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


def stream(split: str) -> str:
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    tokens = TokenShards.open(paths.tokens_dir("fineweb-edu"), split, tokenizer)
    return tokenizer.decode(tokens.ids[:].tolist())


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
    corpus = prepare.prepare_text(old)
    first = prepare.prepare_tokenizer(corpus, old)
    second = prepare.prepare_tokenizer(corpus, replace(old, vocab_size=500, fresh=True))
    (aside,) = base_dir.glob("tokenizer.*")
    assert f"{aside}" in capsys.readouterr().out
    assert Tokenizer.load(aside).hash == first.hash
    assert prepare.prepare_tokenizer(corpus, replace(old, vocab_size=500)).hash == second.hash


def test_an_earlier_tokenizer_is_kept_with_a_note(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(prepare.DEMO, vocab_size=400, max_chars=20_000)
    corpus = prepare.prepare_text(options)
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
