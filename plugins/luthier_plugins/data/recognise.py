"""Recognises the format of a data file from its first row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from luthier.api import DataError, Format, LuthierError, Use
from luthier_plugins.data.reading import raw_rows
from pydantic import ValidationError


def recognised(path: Path, components: Any) -> Use:
    """The one format that recognises a file's first row.

    Args:
        path: The file.
        components: Where formats are looked up.

    Raises:
        DataError: the file has no rows, or no format or several recognise the first.
    """
    line, raw = _first(path)
    keys = set(cast("dict[str, Any]", raw)) if isinstance(raw, Mapping) else set[str]()
    found = [use for use, form in _with_defaults(components) if keys and form.recognises(raw)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(use.name for use in found)
        raise DataError(f"the formats {names} both recognise the row", where=f"{path}:{line}", hint="choose a `format`")
    raise DataError(
        f"the row's keys are those of no format: {', '.join(sorted(keys)) or 'it is not an object'}",
        where=f"{path}:{line}",
        hint="a row has 'messages'; or 'prompt', 'chosen' and 'rejected'; or 'text'; else choose a `format`",
    )


def _first(path: Path) -> tuple[int, Any]:
    errors: list[DataError] = []
    for line, raw in raw_rows(path, errors):
        return line, raw
    if errors:
        raise errors[0]
    raise DataError("has no rows", where=str(path), hint="an empty file cannot be trained on")


def _with_defaults(components: Any) -> list[tuple[Use, Format[Any]]]:
    """Every format that needs no settings; one that needs some, or cannot be made, is not guessed."""
    found: list[tuple[Use, Format[Any]]] = []
    for name in components.names("format"):
        try:
            use: Use = components.use("format", name)
            found.append((use, components.build(use, None)))
        except (LuthierError, ValidationError):
            continue
    return found
