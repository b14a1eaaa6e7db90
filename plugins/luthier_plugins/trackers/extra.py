"""Libraries that come with the extra ``trackers``."""

from __future__ import annotations

import importlib
from typing import Any

from luthier.api import LuthierError


def needed(module: str, package: str) -> Any:
    """A module that has to be installed.

    Raises:
        LuthierError: it is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LuthierError(
            f"{package} is not installed", hint=f"pip install 'luthier[trackers]', or {package}"
        ) from error
