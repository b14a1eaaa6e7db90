"""Raw rows of data files, one after the other: nothing is checked here but that a row can be read."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, cast

from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.artifacts.columns import from_arrow, is_ours
from luthier.data.files import BLOCK, LONGEST, Stream, kind_of, suffix_of
from luthier.data.json_text import array_items, lines, parsed

BATCH = 500
"""Rows of a table that are made objects at a time."""
TOO_LONG = f"is longer than {LONGEST >> 20} MB"
NOT_UTF8 = "is not UTF-8 text"
NULL = "has a null character, which ends texts in other programs"
Found = Iterator[tuple[int, Any]]
"""Lines, or numbers of rows, from 1; and the raw row, or the DataError that says why there is none."""


def raw_rows(path: Path) -> Found:
    """The raw rows of a file with their lines (their numbers, of a table): JSON objects, rows of a table, paragraphs of
    a text, or a document of Markdown. One that cannot be read is a `DataError` in its place.

    Raises:
        DataError: the file cannot be read, or not further.
    """
    kind = kind_of(path)
    assert kind is not None, "files of no known kind are refused where they are named"
    return _READERS[kind](path)


# -- JSON ------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Found:
    with Stream(path) as stream:
        first = stream.peek()
        items = array_items if first.lstrip()[:1] == b"[" else lines
        for number, text in items(stream):
            if text is None:
                yield number, DataError(TOO_LONG)
            elif text and not text.isspace():
                try:
                    yield number, parsed(text)
                except ValueError as error:
                    hint = "each line has to be one JSON object" if items is lines else "it is one of a JSON array"
                    yield number, DataError(f"is not valid JSON ({error})", hint=hint)


# -- tables ----------------------------------------------------------------------------------------


class _Bytes(io.RawIOBase):
    """A stream as the standard library reads it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or self._stream.read(BLOCK)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _texts(stream: Stream) -> io.TextIOWrapper:
    # What is no UTF-8 is found row by row.
    return io.TextIOWrapper(_Bytes(stream), encoding="utf-8", errors="surrogateescape", newline="")  # pyright: ignore[reportArgumentType]


def _csv_rows(path: Path) -> Found:
    csv.field_size_limit(LONGEST)
    with Stream(path) as stream:
        rows = csv.reader(_texts(stream), delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            name, count = Counter(header).most_common(1)[0] if header else ("", 0)
            if count > 1:
                raise DataError(f"has {count} columns '{name}'", where=str(path), hint="rename all but one")
            while True:
                line = rows.line_num + 1
                cells = next(rows, None)
                if cells is None:
                    return
                if cells:
                    yield line, _record(header, cells)
        except csv.Error as error:
            where = f"{path}:{rows.line_num}"
            raise DataError(f"is no table of commas or tabs from here on ({error})", where=where) from error


def _record(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return DataError(f"has {len(cells)} cells, the header has {len(header)}", hint="quote texts with commas")
    found = dict(zip(header, cells, strict=True))
    problem = next((problem for cell in cells if (problem := _odd(cell))), None)
    return found if problem is None else DataError(problem)


def _odd(text: str) -> str | None:
    """What is wrong with a text that was read in the wrong encoding, or holds what no text has."""
    if "\0" in text:
        return NULL
    return None if text.isascii() or not any("\udc80" <= sign <= "\udcff" for sign in text) else NOT_UTF8


def _parquet_rows(path: Path) -> Found:
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        yield from _numbered(file.iter_batches(BATCH))


def _arrow_rows(path: Path) -> Found:
    ipc: Any = import_module("pyarrow.ipc")
    arrow: Any = import_module("pyarrow")
    with arrow.memory_map(str(path)) as file:
        try:
            reader = ipc.open_file(file)
            batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            file.seek(0)
            batches = iter(ipc.open_stream(file))
        yield from _numbered(part for batch in batches for part in _parts(batch))


def _parts(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


def _numbered(batches: Iterator[Any]) -> Found:
    number = 0
    for batch in batches:
        for row in from_arrow(batch) if is_ours(batch.schema) else map(_filled, batch.to_pylist()):
            number += 1
            yield number, row


def _filled(value: Any) -> Any:
    """A value without the keys that others of its column have and it lacks."""
    if isinstance(value, dict):
        inside = cast("dict[str, Any]", value)
        return {key: _filled(item) for key, item in inside.items() if item is not None}
    return [_filled(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def _table(read: Callable[[Path], Found]) -> Callable[[Path], Found]:
    def rows(path: Path) -> Found:
        arrow: Any = import_module("pyarrow")
        try:
            yield from read(path)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"cannot be read: {str(error)[:200]}", where=str(path), hint="copy or download it again"
            ) from error

    return rows


# -- texts -----------------------------------------------------------------------------------------


def _text_rows(path: Path) -> Found:
    with Stream(path) as stream:
        start, block, size = 1, list[bytes](), 0
        for number, line in chain(lines(stream), [(0, b"")]):
            if line is None or line.strip():
                start = number if not block else start
                size += LONGEST + 1 if line is None else len(line) + 1
                if size <= LONGEST:
                    block.append(line or b"")
                elif not block:
                    block = [b""]
            elif block:
                yield start, _document(b"\n".join(block)) if size <= LONGEST else DataError(TOO_LONG)
                block, size = [], 0


def _markdown_rows(path: Path) -> Found:
    with Stream(path) as stream:
        parts: list[bytes] = []
        size = 0
        while part := stream.read(BLOCK):
            size += len(part)
            if size > LONGEST:
                yield 1, DataError(TOO_LONG)
                return
            parts.append(part)
        text = b"".join(parts)
        if text.strip():
            yield 1, _document(text)


def _document(text: bytes) -> Row | DataError:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        return DataError(NOT_UTF8, hint="save the file as UTF-8")
    return DataError(NULL) if "\0" in decoded else {"text": decoded}


_READERS: dict[str, Callable[[Path], Found]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _table(_parquet_rows),
    "arrow": _table(_arrow_rows),
    "text": _text_rows,
    "markdown": _markdown_rows,
}
