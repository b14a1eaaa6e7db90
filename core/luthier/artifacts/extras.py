"""Libraries that come with an extra."""

from __future__ import annotations

import importlib
from typing import Any

from luthier.api.errors import LuthierError


def needed(module: str, package: str, extra: str) -> Any:
    """A module that has to be installed.

    Args:
        module: What is imported.
        package: What is installed for it.
        extra: The extra of Luthier that it comes with.

    Raises:
        LuthierError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LuthierError(
            f"{package} is not installed", hint=f"pip install 'luthier[{extra}]', or {package}"
        ) from error
