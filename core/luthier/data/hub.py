"""Rows of a dataset of the Hugging Face hub, which is in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.api.errors import DataError


def hub_rows(folder: Path, config: str | None, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, from 1, one after the other: never all in memory.

    Which files belong to a configuration and a split is told by the card, or by their names, as `datasets` reads them.

    Args:
        folder: The files, at a pinned commit.
        config: The configuration; None: its only one, or the default.
        split: The split there.

    Raises:
        DataError: there is no such configuration or split, or a file cannot be read.
    """
    # Takes seconds, and is only needed for what is on the hub.
    datasets: Any = import_module("datasets")
    number = 0
    try:
        # A share of a split can only be had of all of it.
        shared = "[" in split
        rows = datasets.load_dataset(str(folder), name=config, split=split, streaming=not shared)
        for row in rows:
            number += 1
            yield number, row
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        where = f"row {number + 1}" if number else None
        raise DataError(
            f"the dataset cannot be read (configuration {config or 'by default'}, split {split}): {error}",
            where=where,
            hint="`hub: {config: ..., split: ...}` says what is read",
        ) from error
