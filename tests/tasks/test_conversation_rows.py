"""A mixture is tokenized when it changes, and by one run at a time."""

import threading
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.conversations import Conversation, conversation
from nanochat.data.packing import PackedRows
from nanochat.data.token_files import TokenFile
from nanochat.locks import folder_lock
from nanochat.runtime import Runtime
from nanochat.tasks.mixtures import conversation_rows
from nanochat.tasks.task import Mixture, Task
from nanochat.tokenizer import Tokenizer


class Echoes(Task):
    name = "echoes"

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Conversation:
        return conversation(f"Say {index}, please", f"{index} it is")


def rows(tokenizer: Tokenizer, sequence_len: int) -> PackedRows:
    return conversation_rows(
        Mixture([Echoes()], name="echoes"),
        tokenizer,
        sequence_len,
        Runtime.start("cpu"),
        learn_all=True,
        one_per_row=True,
    )


def tokens_written() -> tuple[int, int]:
    """Which file there is now, and its size."""
    status = (paths.tokens_dir("echoes") / "train.ids").stat()
    return status.st_ino, status.st_size


def test_what_exceeds_the_context_is_counted_in_one_line(
    base_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tokenizer, 64)
    written = tokens_written()
    assert "note" not in capsys.readouterr().out
    rows(tokenizer, 8)
    assert tokens_written() == written  # not made again
    total = len(TokenFile.open(paths.tokens_dir("echoes"), "train", tokenizer).ids)
    assert f"20 of 20 conversations are longer than the context of 8 tokens: {total - 20 * 8} tokens" in (
        capsys.readouterr().out
    )


def test_a_run_waits_for_another_that_writes_the_same(base_dir: Path, tokenizer: Tokenizer) -> None:
    folder = paths.tokens_dir("echoes")
    folder.mkdir(parents=True)
    waits = threading.Thread(target=rows, args=(tokenizer, 8))
    with folder_lock(folder):
        waits.start()
        waits.join(timeout=0.5)
        assert waits.is_alive() and not (folder / "train.json").exists()
    waits.join()
    assert (folder / "train.json").exists()
