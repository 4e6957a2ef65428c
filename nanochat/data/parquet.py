"""Rows of parquet files: a shard's texts in order, or a task's rows by index."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from nanochat.errors import UserError


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a shard (column `text`), one row group in memory at a time.

    Raises UserError if it is no such file.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


class ParquetRows(Sequence[dict[str, Any]]):
    """The rows of several files of one schema, end to end. Nothing is read before it is asked for.

    They stay in Arrow's memory, a tenth of what the same rows take as Python objects, and pickle as paths.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    @cached_property
    def _table(self) -> pyarrow.Table:
        tables = []
        for path in self.paths:
            try:
                tables.append(pyarrow.parquet.read_table(path))
            except (OSError, pyarrow.ArrowException) as error:
                raise _unreadable(path, error) from None
        return pyarrow.concat_tables(tables).combine_chunks()  # one chunk a column: a row is found in constant time

    @cached_property
    def _length(self) -> int:
        length = 0
        for path in self.paths:
            try:
                length += pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise _unreadable(path, error) from None
        return length

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, there is no row {index}")
        return self._table.slice(index, 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        """One column of all rows; of a nested one, `struct.field`. Cheaper than row by row."""
        head, *fields = name.split(".")
        column = self._table.column(head)
        for field in fields:
            column = pyarrow.compute.struct_field(column, field)
        return column.to_pylist()


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path} ({str(error).splitlines()[0]}): run ./prepare.sh --verify")
