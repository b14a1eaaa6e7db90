"""About how many rows data files hold, told without reading large ones whole."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.api.errors import DataError
from luthier.data.files import BLOCK, COMPRESSED, Stream, data_files, kind_of
from luthier.data.json_text import lines
from luthier.data.raw import raw_rows

WHOLE = 4 * BLOCK
"""Bytes of a file that is counted, not estimated."""
SAMPLE = 1000
"""Rows or lines of a longer one that are looked at."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is.

    Attributes:
        rows: Rows, raw ones.
        characters: Of the files; what sets values apart is counted with them.
    """

    rows: int
    characters: int


def size_of(place: Path) -> Size | None:
    """The size of all data files of a place, estimated from some rows of large ones; None where it cannot be told
    without reading them, or where they cannot be read."""
    try:
        files, _ = data_files(place)
        found = [_size(path) for path in files]
    # What is wrong with a file is said where it is read.
    except (DataError, OSError, ValueError):
        return None
    return Size(sum(size.rows for size in found), sum(size.characters for size in found))


def _size(path: Path) -> Size:
    kind, size = kind_of(path), path.stat().st_size
    if kind == "parquet":
        parquet: Any = import_module("pyarrow.parquet")
        about = parquet.read_metadata(path)
        groups = (about.row_group(place) for place in range(about.num_row_groups))
        return Size(about.num_rows, sum(group.total_byte_size for group in groups))
    if kind == "json" and path.suffix not in COMPRESSED and path.suffix != ".json":
        return _lines(path, size)
    if size <= WHOLE and path.suffix not in COMPRESSED:
        return Size(sum(1 for _ in raw_rows(path)), size)
    raise ValueError("its rows would have to be read")


def _lines(path: Path, size: int) -> Size:
    with Stream(path) as stream:
        most = None if size <= WHOLE else SAMPLE
        found = [len(line or b"") + 1 for _, line in islice(lines(stream), most) if line is None or line.strip()]
    if most is None or not found:
        return Size(len(found), size)
    return Size(size * len(found) // sum(found), size)
