"""Datasets on disk: one Parquet file per split, rows as plain dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from luthier.api.artifact import Artifact
from luthier.api.data import Row, Schema
from luthier.api.errors import DataError
from luthier.api.estimates import tokens_in
from luthier.artifacts.columns import arrow_schema, columns_of, from_arrow, json_columns, optional_in, to_arrow
from luthier.artifacts.rows import COLUMNS, RESERVED, texts_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ROW_GROUP = 20_000
"""Rows that are read together at least."""
CHUNK = 1000
"""Rows that are made Arrow columns at a time."""
COUNTED = 500
"""Rows of a dataset in which tokens are estimated, at least."""


class ParquetRows:
    """A Parquet file that is written batch by batch: never more than a row group in memory. A context manager.

    Args:
        path: The file.
        schema: The Arrow schema of what is written.
    """

    def __init__(self, path: Path, schema: Any) -> None:
        # pyarrow has no type stubs, and is slow to import: not needed for planning.
        self._arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        self._writer = parquet.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._waiting: list[Any] = []
        self._rows = 0

    def write(self, batch: Any) -> None:
        """Write a record batch."""
        self._waiting.append(batch)
        self._rows += batch.num_rows
        if self._rows >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._rows = [], 0

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._flush()
        self._writer.close()


def write_split(folder: Path, split: Split, rows: Sequence[Row]) -> None:
    """Write one split as Parquet; no rows, no file."""
    if rows:
        names = columns_of(_schema_like(rows[0]), {name for row in rows for name in row})
        schema = arrow_schema(names, optional_in(rows), json_columns(rows))
        with ParquetRows(folder / f"{split}.parquet", schema) as file:
            for start in range(0, len(rows), CHUNK):
                file.write(to_arrow(rows[start : start + CHUNK], schema))


def _schema_like(row: Row) -> Schema:
    """The schema with the most columns that a row has."""
    return max(COLUMNS, key=lambda schema: len(row.keys() & set(COLUMNS[schema])))


def read_split(dataset: Artifact, split: Split) -> list[Row]:
    """The rows of one split; empty when the dataset has none."""
    return [row for rows in iter_rows(dataset, split, CHUNK) for row in rows]


def iter_rows(dataset: Artifact, split: Split, size: int) -> Iterator[list[Row]]:
    """The rows of one split, so many at a time: never all in memory."""
    path = dataset.path / f"{split}.parquet"
    if path.exists():
        parquet: Any = import_module("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(size):
                yield from_arrow(batch)


def row_at(dataset: Artifact, split: Split, number: int) -> Row:
    """One row of a split, counted from 0."""
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(dataset.path / f"{split}.parquet") as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number < count:
                return from_arrow(file.read_row_group(group).slice(number, 1))[0]
            number -= count
    raise IndexError(number)


def require_split(dataset: Artifact, split: Split) -> list[Row]:
    """The rows of a split that must exist.

    Raises:
        DataError: the dataset has no such split.
    """
    check_has(dataset, split)
    return read_split(dataset, split)


def check_has(dataset: Artifact, split: Split) -> None:
    """Refuse a dataset without rows in a split.

    Raises:
        DataError: the dataset has no such split.
    """
    if not dataset.facts["rows"].get(split):
        has = ", ".join(name for name in SPLITS if dataset.facts["rows"].get(name)) or "none"
        raise DataError(
            f"the dataset has no rows in the split '{split}' (it has: {has})",
            hint=f"give its stage a split, such as `split: {{{split}: 0.1}}`" if split != "train" else None,
        )


class Sizes:
    """How much text rows hold, counted as they come; tokens are estimated in some of them.

    Attributes:
        characters: Of all texts so far.
    """

    def __init__(self) -> None:
        self.characters = 0
        self._seen = 0
        self._every = 1
        self._sample: list[tuple[int, int]] = []

    def add(self, rows: Iterable[Row]) -> list[int]:
        """Count these rows; gives the characters of each."""
        sizes: list[int] = []
        for row in rows:
            texts = list(texts_of(row))
            size = sum(map(len, texts))
            sizes.append(size)
            self.characters += size
            if self._seen % self._every == 0:
                self._sample.append((size, sum(map(tokens_in, texts))))
                if len(self._sample) > 2 * COUNTED:
                    self._sample = self._sample[::2]
                    self._every *= 2
            self._seen += 1
        return sizes

    def facts(self) -> dict[str, float]:
        """The facts of a dataset that say so."""
        tokens = sum(count for _, count in self._sample)
        per_token = sum(size for size, _ in self._sample) / max(1, tokens)
        return {"characters": self.characters, "characters_per_token": per_token}


def ledger_of(came: Sequence[tuple[str, int]], dropped: Mapping[str, int]) -> list[list[Any]]:
    """What became of rows, as a manifest has it: where they came from, and why some did not stay. The numbers add up to
    the rows that there are.

    Args:
        came: What they are, and how many came.
        dropped: How many did not stay, by reason.
    """
    lost = [[reason, -count] for reason, count in dropped.items() if count]
    return [[what, count] for what, count in came if count] + lost


def dataset_facts(
    schema: Schema,
    splits: Mapping[Split, Sequence[Row]],
    dropped: Mapping[str, int],
    came: Sequence[tuple[str, int]] | None = None,
) -> dict[str, Any]:
    """The manifest facts of a dataset: its schema, rows by split, characters, and dropped rows by reason.

    Args:
        schema: The schema of its rows.
        splits: The rows.
        dropped: How many rows did not stay, by reason.
        came: Where rows came from, see `ledger_of`; by default from the stage.

    Raises:
        DataError: a row is of another schema.
    """
    for row in (row for rows in splits.values() for row in rows):
        if RESERVED & row.keys() != frozenset(COLUMNS[schema]):
            raise DataError(f"a row with the columns {', '.join(sorted(row))} does not match the schema {schema}")
    sizes = Sizes()
    for rows in splits.values():
        sizes.add(rows)
    came = [("rows came", sum(map(len, splits.values())) + sum(dropped.values()))] if came is None else came
    return {
        "schema": schema,
        "rows": {split: len(rows) for split, rows in splits.items() if rows},
        **sizes.facts(),
        "dropped": dict(dropped),
        "ledger": ledger_of(came, dropped),
        "columns": sorted({name for rows in splits.values() for row in rows for name in row}),
    }
