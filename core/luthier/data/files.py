"""Data files: which kinds there are, and their content, decompressed as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.api.artifact import MANIFEST
from luthier.api.errors import DataError
from luthier.artifacts.places import files_at, root_of

BLOCK = 1 << 22
"""Bytes that are read at a time."""
LONGEST = 1 << 24
"""Bytes of a row, at most."""
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "markdown",
    ".markdown": "markdown",
}
"""What the end of a file's name says of it."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BESIDE = frozenset(("dataset_info.json", "state.json", "dataset_dict.json", MANIFEST))
"""Files that describe a folder of `datasets`, or an artifact, and hold no rows."""
SIDES = ("train", "test", "valid", "dev", "eval")
"""How the names of files begin that belong on one side of a split."""
MARK = b"\xef\xbb\xbf"
"""What some programs set before UTF-8."""
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""What a text in UTF-16 begins with."""


def kind_of(path: Path) -> str | None:
    """The kind of a data file by its name; None for a name that says nothing known."""
    return KINDS.get(suffix_of(path))


def suffix_of(path: Path) -> str:
    """The end of a file's name that says its kind, that of a compression left out."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def data_files(place: Path) -> tuple[list[Path], list[Path]]:
    """The data files of a place, and the others there, which are not read.

    Args:
        place: See `luthier.artifacts.places.files_at`.

    Raises:
        DataError: there are none, or they are of several kinds, or one that is named is of no known kind.
    """
    found = [path for path in files_at(place) if path.name not in BESIDE]
    known = ", ".join(KINDS)
    if not found:
        raise DataError("there are no files", where=str(place))
    files = [path for path in found if kind_of(path)]
    if not files:
        what = found[0].name if place.is_file() else f"{found[0].name}, for one,"
        hint = f"files are read whose names end with {known}"
        raise DataError(f"{what} is no data file", where=str(place), hint=hint)
    kinds = sorted({suffix_of(path) for path in files})
    if len({KINDS[kind] for kind in kinds}) > 1:
        raise DataError(
            f"there are files of several kinds: {', '.join(kinds)}",
            where=str(place),
            hint=f"say which with a pattern, such as `{root_of(place).name}/*{kinds[0]}`",
        )
    sides = {side: path for path in files for side in SIDES if path.name.lower().startswith(side)}
    if place.is_dir() and len(sides) > 1:
        names = " and ".join(path.name for path in sides.values())
        raise DataError(
            f"there are files of several splits, {names}, which would become one",
            where=str(place),
            hint=f"read them in a stage each: `{place.name}/{next(iter(sides))}*` with `split: train`, and so on",
        )
    return files, [path for path in found if path not in set(files)]


def named(files: Sequence[Path], place: Path) -> list[str]:
    """Short names of files, by which a row's place is told: relative to the folder or the pattern that named them."""
    root = root_of(place)
    return [str(path.relative_to(root)) for path in files]


def _decompressed(path: Path, compression: str) -> Any:
    arrow: Any = import_module("pyarrow")
    return arrow.CompressedInputStream(arrow.OSFile(str(path)), compression)


class Stream:
    """The content of a file, decompressed, without a byte order mark. A context manager.

    Args:
        path: The file.

    Raises:
        DataError: it is no UTF-8 text, cannot be read, or (while it is read) was cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        compression = COMPRESSED.get(path.suffix.lower())
        try:
            # pyarrow is slow to import: planning reads plain files without it.
            self._file: Any = _decompressed(path, compression) if compression else path.open("rb")
        except OSError as error:
            raise self._failed(error) from error
        self._first: bytes | None = self._read(BLOCK)
        if self._first.startswith(WIDE_MARKS):
            raise DataError("is UTF-16 text", where=str(path), hint="save the file as UTF-8")
        self._first = self._first.removeprefix(MARK)

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> DataError:
        cut = "Truncated" in str(error)
        what = "is cut off: its compressed end is missing" if cut else f"cannot be read: {str(error)[:200]}"
        return DataError(what, where=str(self._path), hint="copy or download it again")

    def peek(self) -> bytes:
        """What the file begins with."""
        return self._first or b""

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end."""
        if self._first:
            first, self._first = self._first, None
            return first
        return self._read(size)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
