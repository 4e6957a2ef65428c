"""A mixture is tokenized when it changes, and by one run at a time."""

import threading
from pathlib import Path

from nanochat import paths
from nanochat.conversations import Conversation, conversation
from nanochat.data.packing import PackedRows
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


def test_longer_rows_are_not_made_from_what_was_cut_shorter(base_dir: Path, tokenizer: Tokenizer) -> None:
    rows(tokenizer, 8)
    short = tokens_written()
    rows(tokenizer, 8)
    assert tokens_written() == short
    rows(tokenizer, 64)
    assert tokens_written()[1] > short[1]


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
