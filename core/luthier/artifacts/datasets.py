"""Datasets on disk: one Parquet file per split, rows as plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from luthier.api.artifact import Artifact
from luthier.api.data import Row, Schema
from luthier.api.errors import DataError
from luthier.artifacts.rows import COLUMNS, RESERVED, texts_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write_split(folder: Path, split: Split, rows: Sequence[Row]) -> None:
    """Write one split as Parquet; no rows, no file."""
    if rows:
        # pyarrow has no type stubs, and is slow to import: not needed for planning.
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(list(rows)), folder / f"{split}.parquet", compression="zstd")


def read_split(dataset: Artifact, split: Split) -> list[Row]:
    """The rows of one split; empty when the dataset has none."""
    path = dataset.path / f"{split}.parquet"
    parquet: Any = import_module("pyarrow.parquet")
    return parquet.read_table(path).to_pylist() if path.exists() else []


def require_split(dataset: Artifact, split: Split) -> list[Row]:
    """The rows of a split that must exist.

    Raises:
        DataError: the dataset has no such split.
    """
    rows = read_split(dataset, split)
    if not rows:
        has = ", ".join(name for name in SPLITS if dataset.facts["rows"].get(name)) or "none"
        raise DataError(
            f"the dataset has no rows in the split '{split}' (it has: {has})",
            hint=f"give its stage a split, such as `split: {{{split}: 0.1}}`" if split != "train" else None,
        )
    return rows


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
        "dropped": dict(dropped),
        "columns": sorted({name for rows in splits.values() for row in rows for name in row}),
    }
