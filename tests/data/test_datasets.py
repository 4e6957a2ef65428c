from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanochat.data.datasets import DATASETS, read_texts, shards_for_depth
from nanochat.data.download import HubFile
from nanochat.errors import UserError
from nanochat.tasks.hub_task import read_parquet
from tests.conftest import StartHub

FINEWEB = DATASETS["fineweb-edu"]


pytestmark = pytest.mark.usefixtures("base_dir")


def test_shards_for_depth() -> None:
    # 20 tokens for each of d20's 561M parameters, at 4.8 characters, are 216 shards of 250M characters and a tenth.
    assert shards_for_depth(20, 65536) == 240
    assert [shards_for_depth(depth, 65536) for depth in (4, 12, 32)] == [16, 80, 800]


@pytest.mark.parametrize("num_shards", [1, -3, 5000])
def test_the_range_of_num_shards(num_shards: int) -> None:
    with pytest.raises(UserError, match=f"--num-shards must be between 2 .*and 1823 .* got {num_shards}"):
        FINEWEB.fetch(num_shards)


def test_more_shards_than_the_hub_has(start_hub: StartHub) -> None:
    start_hub()
    with pytest.raises(UserError, match=r"has 4 files, but no shard_00004.*--num-shards"):
        FINEWEB.fetch(16)


def test_validation_is_always_the_first_shard() -> None:
    files = [HubFile(name, 1, name) for name in [f"shard_{i:05d}.parquet" for i in range(100)]]
    few, many = FINEWEB.open(files[:3]).splits, FINEWEB.open(files).splits
    assert [shard.name for shard in few["val"]] == ["shard_00000"]
    assert few["val"][0].origin == many["val"][0].origin == "shard_00000.parquet"
    assert [shard.name for shard in few["train"]] == ["shard_00001", "shard_00002"]
    assert len(many["train"]) == 99


def test_the_texts_of_a_split(start_hub: StartHub) -> None:
    start_hub()
    dataset = FINEWEB.open(FINEWEB.fetch(2))
    val, train = list(dataset.texts("val")), list(dataset.texts("train"))
    assert len(val) == len(train) == 20
    assert not set(val) & set(train)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot read .*shard\.parquet .*--verify"):
        list(read_texts(tmp_path / "shard.parquet"))
    with pytest.raises(UserError, match=r"cannot read .*shard\.parquet"):
        read_parquet([tmp_path / "shard.parquet"])


def test_rows_of_several_files_by_index(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "inner": {"number": i}} for i in range(25)]
    for i, part in enumerate((rows[:10], rows[10:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{i}.parquet", row_group_size=4)
    assert read_parquet([tmp_path / "0.parquet", tmp_path / "1.parquet"]).to_pylist() == rows
