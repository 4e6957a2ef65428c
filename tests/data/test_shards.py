from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanochat import paths
from nanochat.data.corpora import HubShards, texts
from nanochat.data.manifest import HubFile
from nanochat.data.parquet import ParquetRows, read_texts
from nanochat.data.shards import DATASETS, shards_for_depth
from nanochat.errors import UserError
from tests.conftest import StartHub

FINEWEB = DATASETS["fineweb-edu"]


pytestmark = pytest.mark.usefixtures("base_dir")


def test_a_depth_needs_its_shards() -> None:
    # 20 tokens for each of d20's 561M parameters, at 4.8 characters, are 216 shards of 250M characters and a tenth.
    assert shards_for_depth(20, 65536) == 240
    assert [shards_for_depth(depth, 65536) for depth in (4, 12, 32)] == [16, 80, 800]


@pytest.mark.parametrize(("num_shards", "nearest"), [(1, 2), (-3, 2), (5000, 1823)])
def test_a_number_of_shards_that_cannot_be(num_shards: int, nearest: int) -> None:
    with pytest.raises(UserError, match=f"--num-shards {num_shards} cannot be .* the nearest that can is {nearest}"):
        FINEWEB.fetch(num_shards)


def test_more_shards_than_the_hub_has(start_hub: StartHub) -> None:
    start_hub()
    with pytest.raises(UserError, match="--num-shards 4"):
        FINEWEB.fetch(16)


def test_validation_is_the_same_shard_however_many_there_are() -> None:
    files = [HubFile(name, 1, name) for name in FINEWEB.shard_names(100)]
    few, many = HubShards("fineweb-edu", files[:3]), HubShards("fineweb-edu", files)
    assert [shard.name for shard in few.shards("val")] == ["shard_00000"]
    assert few.shards("val") == many.shards("val")
    assert [shard.name for shard in few.shards("train")] == ["shard_00001", "shard_00002"]
    assert len(many.shards("train")) == 99
    assert few.shards("train")[0].path == paths.data_dir("fineweb-edu") / "shard_00001.parquet"


def test_the_texts_of_a_split(start_hub: StartHub) -> None:
    start_hub()
    corpus = HubShards("fineweb-edu", FINEWEB.fetch(2))
    val, train = list(texts(corpus, "val")), list(texts(corpus, "train"))
    assert len(val) == len(train) == 20
    assert not set(val) & set(train)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot read .*shard\.parquet .*--verify"):
        list(read_texts(tmp_path / "shard.parquet"))
    with pytest.raises(UserError, match=r"cannot read .*shard\.parquet"):
        len(ParquetRows([tmp_path / "shard.parquet"]))


def test_rows_of_several_files_by_index(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "inner": {"number": i}} for i in range(25)]
    for i, part in enumerate((rows[:10], rows[10:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{i}.parquet", row_group_size=4)
    found = ParquetRows([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert len(found) == 25
    assert [found[i] for i in range(25)] == rows
    assert found[8:12] == rows[8:12]
    assert found.column("inner.number") == list(range(25))
    with pytest.raises(IndexError, match="there are 25 rows, there is no row 25"):
        found[25]
