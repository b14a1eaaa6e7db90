"""Recognises a row's format from its keys."""

from __future__ import annotations

from typing import Any, cast

from luthier.api import DataError, Format, StageContext

KEYS = {"messages": ("messages",), "preference": ("prompt", "chosen", "rejected"), "text": ("text",)}


def recognised(raw: Any, context: StageContext) -> tuple[str, Format]:
    """The name of the format whose keys the row has, and its parser.

    Raises:
        DataError: the row has the keys of none of the known formats.
    """
    keys = set(cast("dict[str, Any]", raw)) if isinstance(raw, dict) else set[str]()
    for name, needed in KEYS.items():
        if keys.issuperset(needed):
            return name, context.make("format", name)
    raise DataError(
        f"the row's keys are those of no format: {', '.join(sorted(keys)) or 'it is not an object'}",
        hint="a row has 'messages'; or 'prompt', 'chosen' and 'rejected'; or 'text'; else choose a `format`",
    )
