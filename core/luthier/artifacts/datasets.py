"""Datasets on disk: one Parquet file per split, rows as plain dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from luthier.api.artifact import Artifact
from luthier.api.data import Row, Schema
from luthier.api.errors import DataError
from luthier.api.estimates import tokens_in
from luthier.artifacts.rows import COLUMNS, RESERVED, texts_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ROW_GROUP = 20_000
"""Rows that are read together at least."""


def write_split(folder: Path, split: Split, rows: Sequence[Row]) -> None:
    """Write one split as Parquet; no rows, no file."""
    if rows:
        # pyarrow has no type stubs, and is slow to import: not needed for planning.
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        table = arrow.Table.from_pylist(list(rows))
        parquet.write_table(table, folder / f"{split}.parquet", compression="zstd", row_group_size=ROW_GROUP)


def read_split(dataset: Artifact, split: Split) -> list[Row]:
    """The rows of one split; empty when the dataset has none."""
    path = dataset.path / f"{split}.parquet"
    parquet: Any = import_module("pyarrow.parquet")
    return parquet.read_table(path).to_pylist() if path.exists() else []


def iter_rows(dataset: Artifact, split: Split, size: int) -> Iterator[list[Row]]:
    """The rows of one split, so many at a time: never all in memory."""
    path = dataset.path / f"{split}.parquet"
    if path.exists():
        parquet: Any = import_module("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(size):
                yield batch.to_pylist()


def row_at(dataset: Artifact, split: Split, number: int) -> Row:
    """One row of a split, counted from 0."""
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(dataset.path / f"{split}.parquet") as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number < count:
                return file.read_row_group(group).slice(number, 1).to_pylist()[0]
            number -= count
    raise IndexError(number)


COUNTED = 500
"""Rows of a split in which tokens are estimated."""


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


def _characters_per_token(splits: Mapping[Split, Sequence[Row]]) -> float:
    """About how many characters of these rows are a token, by some of them."""
    rows = [row for found in splits.values() for row in found[:: max(1, len(found) // COUNTED)]]
    texts = [text for row in rows for text in texts_of(row)]
    return sum(map(len, texts)) / max(1, sum(map(tokens_in, texts)))


def dataset_facts(schema: Schema, splits: Mapping[Split, Sequence[Row]], dropped: Mapping[str, int]) -> dict[str, Any]:
    """The manifest facts of a dataset: its schema, rows by split, characters, and dropped rows by reason.

    Raises:
        DataError: a row is of another schema.
    """
    for row in (row for rows in splits.values() for row in rows):
        if RESERVED & row.keys() != frozenset(COLUMNS[schema]):
            raise DataError(f"a row with the columns {', '.join(sorted(row))} does not match the schema {schema}")
    return {
        "schema": schema,
        "rows": {split: len(rows) for split, rows in splits.items() if rows},
        "characters": sum(len(text) for rows in splits.values() for row in rows for text in texts_of(row)),
        "characters_per_token": _characters_per_token(splits),
        "dropped": dict(dropped),
        "columns": sorted({name for rows in splits.values() for row in rows for name in row}),
    }
