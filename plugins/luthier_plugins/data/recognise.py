"""Recognises the format of data files from their first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from luthier.api import DataError, Format, LuthierError, PluginError, Use
from luthier.data.files import data_files
from luthier.data.raw import raw_rows
from pydantic import ValidationError

ROWS = 100
"""Rows that are read, at most."""


def recognised(places: Sequence[Path], columns: Mapping[str, str], components: Any) -> Use:
    """The one format that recognises the first row that any does; rows before it are bad ones, which reading reports.

    Args:
        places: Where the files are; the first file of the first one is read.
        columns: Other names for keys, by their names in the rows.
        components: Where formats are looked up.

    Raises:
        DataError: the file has no rows, or no format recognises one, or several do.
    """
    path = data_files(places[0])[0][0]
    formats = with_defaults(components)
    bad: DataError | None = None
    first: tuple[int, Any] | None = None
    for line, raw in islice(raw_rows(path), ROWS):
        if isinstance(raw, DataError):
            bad = bad or DataError(raw.message, where=f"{path}:{line}", hint=raw.hint)
            continue
        raw = renamed(raw, columns) if isinstance(raw, dict) else raw
        first = first or (line, raw)
        found = [use for use, form in formats if isinstance(raw, dict) and recognises(use, form, raw, components)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(use.name for use in found)
            where = f"{path}:{line}"
            raise DataError(f"the formats {names} both recognise the row", where=where, hint="choose a `format`")
    if first is None:
        raise bad or DataError("has no rows", where=str(path), hint="an empty file cannot be trained on")
    keys = sorted(cast("dict[str, Any]", first[1]))[:ROWS] if isinstance(first[1], dict) else []
    raise DataError(
        f"the row's keys match no format: {', '.join(keys) or 'it is not an object'}",
        where=f"{path}:{first[0]}",
        hint="a row has 'messages'; 'conversations'; 'instruction' and 'output'; 'prompt' with 'completion', with "
        "'chosen' and 'rejected', or alone; or 'text'. Give keys these names with `columns`, or choose a `format`",
    )


def renamed(raw: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A raw row whose keys have the names that a recipe gives them.

    Raises:
        DataError: two keys would have one name.
    """
    if not columns:
        return raw
    made = {columns.get(key, key): value for key, value in raw.items()}
    if len(made) < len(raw):
        twice = Counter(columns.get(key, key) for key in raw).most_common(1)[0][0]
        raise DataError(f"has the key '{twice}' already", hint="`columns` can give that one another name, too")
    return made


def with_defaults(components: Any) -> list[tuple[Use, Format[Any]]]:
    """Every format that needs no settings; one that needs some, or cannot be made, is not guessed."""
    found: list[tuple[Use, Format[Any]]] = []
    for name in components.names("format"):
        try:
            use: Use = components.use("format", name)
            found.append((use, components.build(use, None)))
        except (LuthierError, ValidationError):
            continue
    return found


def recognises(use: Use, form: Format[Any], raw: dict[str, Any], components: Any) -> bool:
    """Whether a format says that a row is its own.

    Raises:
        PluginError: it cannot say.
    """
    try:
        return bool(form.recognises(raw))
    # A format is foreign code: whatever it raises is reported under its name.
    except Exception as error:
        raise PluginError(
            f"the format '{use.name}' of {components.provider(use.component)} cannot say whether a row is its own: "
            f"{type(error).__name__}: {error}",
            hint="choose a `format`, and report this to its author",
        ) from error
