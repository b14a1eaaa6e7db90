"""Reads the raw rows of a data file, with their lines; no row is checked here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.api import DataError, Row

DEEPEST = 100
"""Levels of a row, at most; libraries call themselves for each of them."""
BRACKETS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
"""What decides how deep JSON is nested; a sign behind a backslash does not."""


def raw_rows(path: Path, errors: list[DataError]) -> Iterator[tuple[int, Any]]:
    """The raw rows of a file with their lines: JSON lines, or the paragraphs of a text.

    Args:
        path: The file.
        errors: Takes what is wrong with single lines.

    Raises:
        DataError: the file is none that can be read.
    """
    if path.is_dir():
        raise DataError("is a folder", where=str(path), hint="name one .jsonl or .txt file")
    text = path.read_bytes()
    try:
        lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8 text", where=f"{path}:{line}", hint="save the file as UTF-8") from error
    if path.suffix == ".txt":
        yield from _paragraphs(lines)
        return
    _refuse_other_files(path, lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if _nesting(line) > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep")
            raw = json.loads(line, object_pairs_hook=_object)
            # Half a surrogate pair is valid JSON, but no text that can be stored.
            json.dumps(raw, ensure_ascii=False).encode("utf-8")
        except ValueError as error:
            where = f"{path}:{number}"
            errors.append(
                DataError(f"is not valid JSON ({error})", where=where, hint="each line has to be one JSON object")
            )
        else:
            yield number, raw


def _nesting(line: str) -> int:
    """How deep a line of JSON may be nested, at most."""
    if line.count("[") + line.count("{") <= DEEPEST:
        return 0
    depth = deepest = 0
    inside = False
    for sign in BRACKETS.findall(line):
        if sign == '"':
            inside = not inside
        elif not inside and sign in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not inside and sign in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key is lost to another of the same name.

    Raises:
        ValueError: a key occurs twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' occurs twice in one object")
    return made


def _refuse_other_files(path: Path, lines: list[str]) -> None:
    """One message instead of one for each line where a file is something else altogether."""
    first = next((line.strip() for line in lines if line.strip()), "")
    if first.startswith("["):
        raise DataError("is one JSON array", where=str(path), hint="write one object per line (JSON Lines)")
    if path.suffix in (".csv", ".tsv", ".parquet"):
        raise DataError(
            f"is a {path.suffix} file", where=str(path), hint="convert it to JSON Lines, an object per line"
        )


def _paragraphs(lines: list[str]) -> Iterator[tuple[int, Row]]:
    start, block = 1, list[str]()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            start = number if not block else start
            block.append(line)
        elif block:
            yield start, {"text": "\n".join(block)}
            block = []
