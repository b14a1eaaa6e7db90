"""How fast work of a kind went on this machine, from which plans tell the time."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from luthier.api.errors import ModelError
from luthier.artifacts.digest import digest_value
from luthier.artifacts.json_files import read_json, write_json


def _file_of(cache: Path, kind: str) -> Path:
    return cache / "pace" / f"{digest_value([kind, platform.node()])}.json"


def note_pace(cache: Path, kind: str, parameters: int, tokens_per_second: float) -> None:
    """Keep how fast it went.

    Args:
        cache: The store's folder for what can be made again.
        kind: Names what was done, and how: only the same goes as fast.
        parameters: Of the model; the time for a token is taken to grow with it.
        tokens_per_second: The speed.
    """
    file = _file_of(cache, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"kind": kind, "parameters": parameters, "tokens_per_second": tokens_per_second})


def expected_seconds(cache: Path, kind: str, parameters: int, tokens: int) -> float | None:
    """How long it will take at the speed of the last time; None where there was none."""
    try:
        known: dict[str, Any] = read_json(_file_of(cache, kind))
        return tokens / known["tokens_per_second"] * parameters / known["parameters"]
    except (ModelError, KeyError, TypeError, ZeroDivisionError):
        # Not there, or cut off: it is made again with the next run.
        return None
