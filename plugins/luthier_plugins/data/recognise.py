"""Recognises the format of a data file from its first rows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, cast

from luthier.api import DataError, Format, LuthierError, PluginError, Use
from luthier_plugins.data.reading import raw_rows
from pydantic import ValidationError

ROWS = 100
"""Rows that are read, at most."""


def recognised(path: Path, components: Any) -> Use:
    """The one format that recognises the first row that any does; rows before it are bad ones, which reading reports.

    Args:
        path: The file.
        components: Where formats are looked up.

    Raises:
        DataError: the file has no rows, or no format recognises one, or several do.
    """
    formats = _with_defaults(components)
    errors: list[DataError] = []
    first: tuple[int, Any] | None = None
    for line, raw in islice(raw_rows(path, errors), ROWS):
        first = first or (line, raw)
        found = [use for use, form in formats if isinstance(raw, dict) and _recognises(use, form, raw, components)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(use.name for use in found)
            where = f"{path}:{line}"
            raise DataError(f"the formats {names} both recognise the row", where=where, hint="choose a `format`")
    if first is None:
        raise (
            errors[0]
            if errors
            else DataError("has no rows", where=str(path), hint="an empty file cannot be trained on")
        )
    keys = sorted(cast("dict[str, Any]", first[1])) if isinstance(first[1], dict) else []
    raise DataError(
        f"the row's keys match no format: {', '.join(keys) or 'it is not an object'}",
        where=f"{path}:{first[0]}",
        hint="a row has 'messages'; or 'prompt' with 'chosen' and 'rejected', or with 'completion' and 'label'; or "
        "'text'; else choose a `format`",
    )


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


def _recognises(use: Use, form: Format[Any], raw: dict[str, Any], components: Any) -> bool:
    try:
        return bool(form.recognises(raw))
    # A format is foreign code: whatever it raises is reported under its name.
    except Exception as error:
        raise PluginError(
            f"the format '{use.name}' of {components.provider(use.component)} cannot say whether a row is its own: "
            f"{type(error).__name__}: {error}",
            hint="choose a `format`, and report this to its author",
        ) from error
