"""Rows on disk between their reading and their writing: only when all are read is it known which columns there are, and
which of them they belong to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.api.data import COLUMNS, ID, PARENTS, SOURCE, TOOLS, WEIGHT, Row, Schema
from luthier.api.errors import DataError
from luthier.artifacts.columns import (
    OPTIONAL,
    TALKS,
    arrow_schema,
    columns_of,
    from_arrow,
    json_columns,
    optional_in,
    to_arrow,
)
from luthier.artifacts.datasets import ParquetRows

READ = 5000
"""Rows that are read together."""


class Spool:
    """Rows of a schema, written once and read once or more. A context manager while it is written.

    Args:
        path: The file.
        schema: The schema of the rows.
        kept: Columns beside those that mean something.

    Attributes:
        columns: The columns that rows have.
    """

    def __init__(self, path: Path, schema: Schema, kept: Collection[str] = ()) -> None:
        self.columns: set[str] = set()
        self._path = path
        self._of: Schema = schema
        self._kept = set(kept)
        self._optional: set[str] = set()
        self._as_json: set[str] = set()
        self._file: ParquetRows | None = None
        self._written: Any = None

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            DataError: a format gives them a column that no row had at first.
        """
        if self._file is None:
            extra = self._kept | {name for row in rows for name in row}
            names = columns_of(self._of, {*COLUMNS[self._of], TOOLS, WEIGHT, ID, SOURCE, PARENTS, *extra})
            self._kept = extra - {*COLUMNS[self._of], TOOLS, WEIGHT, ID, SOURCE, PARENTS}
            self._written = arrow_schema(names, OPTIONAL, self._kept)
            self._file = ParquetRows(self._path, self._written).__enter__()
        self.columns |= {name for row in rows for name in row}
        late = sorted(self.columns - set(self._written.names))
        if late:
            raise DataError(
                f"the format gives the column '{late[0]}' to some rows only, and not to the first",
                hint="report this to its author: a format gives its own columns to all rows",
            )
        self._optional |= optional_in(rows)
        self._as_json |= json_columns(rows)
        self._file.write(to_arrow(rows, self._written))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)

    @property
    def schema(self) -> Any:
        """The Arrow schema of what is read."""
        return arrow_schema(columns_of(self._of, self.columns), self._optional, self._as_json)

    def batches(self) -> Iterator[Any]:
        """The rows as record batches of `schema`."""
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        schema = self.schema
        texts = {name for name in self._kept - self._as_json if name in self.columns}
        with parquet.ParquetFile(self._path) as file:
            for batch in file.iter_batches(READ, columns=self._paths(file)):
                arrays = [
                    arrow.array(
                        [None if text is None else orjson.loads(text) for text in batch.column(name).to_pylist()]
                    )
                    if name in texts
                    else batch.column(name)
                    for name in schema.names
                ]
                yield arrow.RecordBatch.from_arrays(arrays, schema=schema)

    def rows_at(self, places: Collection[int]) -> dict[int, Row]:
        """The rows at some places, counted from 0."""
        found: dict[int, Row] = {}
        wanted, start = np.unique(np.fromiter(places, np.int64)), 0
        for batch in self.batches():
            mine = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
            if len(mine):
                found |= dict(zip(mine.tolist(), from_arrow(batch.take(mine - start)), strict=True))
            start += batch.num_rows
        return found

    def _paths(self, file: Any) -> list[str]:
        """What is read of the file: of messages only what some have."""
        every = (file.schema.column(place).path for place in range(len(file.schema)))
        return [path for path in every if self._has(path)]

    def _has(self, path: str) -> bool:
        column, _, leaf = path.split(".")[0], "", path.rsplit(".", 1)[-1]
        return column in self.columns and not (column in TALKS and leaf in OPTIONAL and leaf not in self._optional)
