"""Rows as Arrow columns: what a Parquet file of a dataset looks like, and back.

Tool calls, tools and whatever else may hold anything are JSON there: a column of structs would give every row the keys
of all others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import orjson

from luthier.api.data import COLUMNS, ID, PARENTS, SOURCE, TOOLS, WEIGHT, Message, Row, Schema

TALKS = ("messages", "prompt", "chosen", "rejected", "completion")
"""The columns that hold messages."""
OPTIONAL = ("tool_calls", "tool_call_id", "name", "reasoning", "train")
"""What a message may have beside its role and its content."""
JSON = {b"luthier": b"json"}
"""The metadata of a column that holds JSON."""
OURS = {b"luthier": b"rows"}
"""The metadata of a file whose columns these are."""


def optional_in(rows: Iterable[Row]) -> set[str]:
    """What messages of these rows have beside their role and their content."""
    return {key for row in rows for column in TALKS for item in row.get(column) or () for key in item} & set(OPTIONAL)


def json_columns(rows: Iterable[Row]) -> set[str]:
    """The columns that rows have beside those of a schema, of which one is no text."""
    known = {*(name for columns in COLUMNS.values() for name in columns), TOOLS, WEIGHT, ID, SOURCE, PARENTS}
    return {name for row in rows for name, value in row.items() if name not in known and not isinstance(value, str)}


def arrow_schema(columns: Sequence[str], optional: Collection[str] = OPTIONAL, as_json: Collection[str] = ()) -> Any:
    """The Arrow schema of rows with these columns.

    Args:
        columns: Their names.
        optional: What messages may have, see `OPTIONAL`.
        as_json: The columns that hold something other than text, beside those that are known.
    """
    arrow: Any = import_module("pyarrow")
    message = [arrow.field("role", arrow.string()), arrow.field("content", arrow.string())]
    for name in (name for name in OPTIONAL if name in optional):
        message.append(arrow.field(name, arrow.bool_() if name == "train" else arrow.string()))
    known = {
        **dict.fromkeys(TALKS, arrow.list_(arrow.struct(message))),
        "label": arrow.bool_(),
        WEIGHT: arrow.float64(),
        PARENTS: arrow.list_(arrow.string()),
    }
    return arrow.schema(
        [
            arrow.field(
                name, known.get(name, arrow.string()), metadata=JSON if name == TOOLS or name in as_json else None
            )
            for name in columns
        ],
        metadata=OURS,
    )


def to_arrow(rows: Sequence[Row], schema: Any) -> Any:
    """A record batch of rows."""
    arrow: Any = import_module("pyarrow")
    as_json = {field.name for field in schema if field.metadata == JSON}
    arrays = [
        arrow.array([_stored(name, row.get(name), name in as_json) for row in rows], schema.field(name).type)
        for name in schema.names
    ]
    return arrow.RecordBatch.from_arrays(arrays, schema=schema)


def _stored(name: str, value: Any, as_json: bool) -> Any:
    if value is None:
        return None
    if as_json:
        return _json(value)
    if name in TALKS:
        calls = any("tool_calls" in item for item in value)
        return [_stored_message(item) for item in value] if calls else value
    return value


def _stored_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    return {**message, "tool_calls": _json(message["tool_calls"])}


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def is_ours(schema: Any) -> bool:
    """Whether an Arrow schema is that of a dataset, and not of any other table."""
    return (schema.metadata or {}).items() >= OURS.items()


def from_arrow(batch: Any) -> list[Row]:
    """The rows of a dataset's record batch or table: what a row lacks is no key of it."""
    columns: list[tuple[str, list[Any]]] = []
    for field in batch.schema:
        values: list[Any] = batch.column(field.name).to_pylist()
        if field.metadata == JSON:
            values = [None if value is None else orjson.loads(value) for value in values]
        elif field.name in TALKS:
            values = [None if value is None else [_message(item) for item in value] for value in values]
        columns.append((field.name, values))
    names = [name for name, _ in columns]
    return [
        {name: value for name, value in zip(names, found, strict=True) if value is not None}
        for found in zip(*(values for _, values in columns), strict=True)
    ]


def _message(found: dict[str, Any]) -> Message:
    if len(found) > 2:
        found = {key: value for key, value in found.items() if value is not None}
        if "tool_calls" in found:
            found["tool_calls"] = orjson.loads(found["tool_calls"])
    return cast("Message", found)


def columns_of(schema: Schema, names: Iterable[str]) -> list[str]:
    """The columns of a dataset in their order: those of its schema, those with a meaning, then others by name."""
    has = set(names)
    first = [*COLUMNS[schema], TOOLS, WEIGHT, ID, SOURCE, PARENTS]
    return [name for name in first if name in has] + sorted(has - set(first))
