"""Token files: whole, and tied to their tokenizer and text."""

from pathlib import Path

import pytest

from nanochat.conversations import Conversation
from nanochat.data.packing import PackedRows
from nanochat.data.token_files import TokenFile
from nanochat.data.token_writer import is_current, write_conversations, write_documents
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer


def test_conversations_keep_their_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat: Conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    write_conversations(tmp_path, "train", tokenizer, [chat, chat], origin="x")
    file = TokenFile.open(tmp_path, "train", tokenizer)
    rendered = tokenizer.render_conversation(chat)
    assert file.mask is not None
    assert file.ids[:].tolist() == rendered.ids * 2 and file.mask[:].tolist() == rendered.mask * 2


def test_another_tokenizer_or_text_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path, "val", tokenizer, ["text"], "version 1")
    assert is_current(tmp_path, "val", tokenizer, "version 1")
    assert not is_current(tmp_path, "val", tokenizer, "version 2")
    other = Tokenizer.train(["some other text for other merges"] * 3, 270)
    assert not is_current(tmp_path, "val", other, "version 1")
    with pytest.raises(UserError, match="tokenizer"):
        TokenFile.open(tmp_path, "val", other)


def test_missing_and_cut_files_get_a_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"\./prepare\.sh"):
        TokenFile.open(tmp_path, "train", tokenizer)
    write_documents(tmp_path, "train", tokenizer, ["some text"], "x")
    ids = tmp_path / "train.ids"
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged"):
        TokenFile.open(tmp_path, "train", tokenizer)


def test_an_interrupted_write_leaves_no_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts():  # type: ignore[no-untyped-def]  # a generator that fails
        yield "first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path, "train", tokenizer, texts(), "x")
    assert not is_current(tmp_path, "train", tokenizer, "x")


def test_an_interrupted_rewrite_leaves_the_split_that_was_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts():  # type: ignore[no-untyped-def]  # a generator that fails
        yield "second"
        raise KeyboardInterrupt

    write_documents(tmp_path, "train", tokenizer, ["first"], "1")
    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path, "train", tokenizer, texts(), "2")
    assert is_current(tmp_path, "train", tokenizer, "1")
    assert tokenizer.decode(TokenFile.open(tmp_path, "train", tokenizer).ids[:].tolist()) == "<|bos|>first"


def test_a_run_keeps_the_tokens_it_has_mapped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path, "train", tokenizer, ["the first text"], "1")
    mapped = TokenFile.open(tmp_path, "train", tokenizer)
    write_documents(tmp_path, "train", tokenizer, ["another"], "2")
    assert tokenizer.decode(mapped.ids[:].tolist()) == "<|bos|>the first text"
    assert tokenizer.decode(TokenFile.open(tmp_path, "train", tokenizer).ids[:].tolist()) == "<|bos|>another"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("part", ["ids", "mask", "offsets"])
def test_a_damaged_part_is_named_when_rows_are_read(tmp_path: Path, tokenizer: Tokenizer, part: str) -> None:
    chat: Conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    write_conversations(tmp_path, "train", tokenizer, [chat] * 8, origin="x")
    path = tmp_path / f"train.{part}"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=rf"train\.{part} is damaged.*\./prepare\.sh"):
        PackedRows(TokenFile.open(tmp_path, "train", tokenizer), 64, tokenizer.bos_id, learn_all=False)[0]


def test_damaged_settings_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path, "train", tokenizer, ["text"], "x")
    (tmp_path / "train.json").write_text('{"tokenizer": ')
    with pytest.raises(UserError, match=r"train.json is damaged"):
        TokenFile.open(tmp_path, "train", tokenizer)
    assert not is_current(tmp_path, "train", tokenizer, "x")
