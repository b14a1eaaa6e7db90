"""Reads JSON files that come from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from luthier.api.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is missing", where=str(path.parent)) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise ModelError(f"is not valid JSON ({error})", where=str(path)) from error
    except RecursionError as error:
        raise ModelError("is nested too deep to be read", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return cast("dict[str, Any]", value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as the Hugging Face libraries do."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
