import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nanochat.data.batches import StreamRows
from nanochat.data.token_files import ShardedIds, TokenFile, TokenShards
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.errors import UserError
from nanochat.model.loss import IGNORE
from nanochat.tokenizer import Tokenizer

TEXTS = [f"Document {i} of many, about the number {i * i}. " * (i % 5 + 1) for i in range(60)]


def read(name: str, lines: tuple[str, ...], log: Path) -> tuple[str, ...]:
    """Texts of a shard; notes the reading in a file that other processes append to as well."""
    with open(log, "a") as file:
        file.write(f"{name}\n")
    return lines


def shard(name: str, lines: list[str], log: Path) -> TextShard:
    return TextShard(name, repr(lines), partial(read, name, tuple(lines), log))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture
def shards(tmp_path: Path) -> list[TextShard]:
    return [shard(f"shard_{i}", TEXTS[i * 15 : i * 15 + 15], tmp_path / "log") for i in range(4)]


def written(log: Path) -> list[str]:
    names = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_shards_of_a_split_are_one_stream(
    tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path, workers: int
) -> None:
    splits = {"val": shards[:1], "train": shards[1:]}
    assert write_shards(tmp_path / "tokens", splits, tokenizer, workers) == 4
    for split, texts in (("val", TEXTS[:15]), ("train", TEXTS[15:])):
        tokens = TokenShards.open(tmp_path / "tokens", split, tokenizer)
        assert tokens.ids[:].tolist() == expected(tokenizer, texts)
        assert tokens.num_documents == len(texts)
        assert tokens.num_bytes == sum(len(text.encode()) for text in texts)


def test_only_what_is_missing_or_stale_is_made(tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    write_shards(folder, {"train": shards[:2]}, tokenizer, 1)
    assert written(tmp_path / "log") == ["shard_0", "shard_1"]
    write_shards(folder, {"train": shards}, tokenizer, 1)
    assert written(tmp_path / "log") == ["shard_2", "shard_3"]
    (folder / "shard_2.json").unlink()  # as if the process had been killed while it wrote
    with open(folder / "shard_3.ids", "r+b") as file:
        file.truncate(10)
    changed = shard("shard_1", ["Other text."], tmp_path / "log")
    write_shards(folder, {"train": [shards[0], changed, *shards[2:]]}, tokenizer, 1)
    assert written(tmp_path / "log") == ["shard_1", "shard_2", "shard_3"]
    assert write_shards(folder, {"train": shards}, Tokenizer.train(TEXTS, 270), 1) == 4


def test_fewer_shards_than_before_are_a_shorter_stream(
    tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path
) -> None:
    for count in (4, 2):
        write_shards(tmp_path, {"train": shards[:count]}, tokenizer, 1)
        ids = TokenShards.open(tmp_path, "train", tokenizer).ids
        assert ids[:].tolist() == expected(tokenizer, TEXTS[: 15 * count])


def test_another_tokenizer_and_missing_tokens_are_refused(
    tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"prepare\.sh"):
        TokenShards.open(tmp_path, "train", tokenizer)
    write_shards(tmp_path, {"train": shards}, tokenizer, 1)
    with pytest.raises(UserError, match="tokenizer"):
        TokenShards.open(tmp_path, "train", Tokenizer.train(TEXTS, 270))
    (tmp_path / "shard_1.json").unlink()
    with pytest.raises(UserError, match=r"prepare\.sh"):
        TokenShards.open(tmp_path, "train", tokenizer)


def die() -> tuple[str, ...]:
    os.kill(os.getpid(), signal.SIGKILL)
    return ()


def test_a_process_that_is_killed_gets_a_sentence_and_the_next_run_makes_the_rest(
    tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path
) -> None:
    deadly = TextShard("shard_4", "", die)
    with pytest.raises(UserError, match=r"killed.*\./prepare\.sh"):
        write_shards(tmp_path, {"train": [*shards, deadly]}, tokenizer, 2)
    write_shards(tmp_path, {"train": shards}, tokenizer, 1)
    assert TokenShards.open(tmp_path, "train", tokenizer).ids[:].tolist() == expected(tokenizer, TEXTS)


def test_slices_are_those_of_the_arrays_joined() -> None:
    arrays = [np.arange(0, 5, dtype=np.uint16), np.empty(0, np.uint16), np.arange(5, 7, dtype=np.uint16)]
    ids, joined = ShardedIds(arrays), np.arange(7)
    assert len(ids) == 7
    for start in range(9):
        for stop in range(9):
            assert ids[start:stop].tolist() == joined[start:stop].tolist()
    with pytest.raises(ValueError, match="without a step"):
        ids[::2]


def test_rows_over_shards_predict_every_token_once_and_documents_can_be_learned_apart(
    tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path
) -> None:
    write_shards(tmp_path, {"train": shards}, tokenizer, 1)
    rows = StreamRows(TokenShards.open(tmp_path, "train", tokenizer), 32, tokenizer.bos_id)
    stream = expected(tokenizer, TEXTS)
    targets = [rows[i].targets for i in range(len(rows))]
    assert all(rows[i].tokens[0] == tokenizer.bos_id for i in range(len(rows)))
    learned = [token for row in targets for token in row.tolist() if token != IGNORE]
    opening = sum(stream[i] == tokenizer.bos_id for i in range(0, len(stream), 32))  # given, not predicted
    assert len(learned) == len(stream) - opening
    assert learned.count(tokenizer.bos_id) == len(TEXTS) - opening


def test_a_token_file_of_documents_has_no_mask(tokenizer: Tokenizer, shards: list[TextShard], tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": shards[:1]}, tokenizer, 1)
    assert TokenFile.open(tmp_path, "shard_0", tokenizer).mask is None
    assert json.loads((tmp_path / "train.shards.json").read_text()) == {"shards": ["shard_0"]}
