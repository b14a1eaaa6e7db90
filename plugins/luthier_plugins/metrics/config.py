"""The configs of the metrics."""

from __future__ import annotations

from luthier.api import Config


class ExactMatchConfig(Config):
    """What counts as equal."""

    strip: bool = True
    """Ignore white space at both ends."""
    ignore_case: bool = False
    """Ignore upper and lower case."""


class PerplexityConfig(Config):
    """Nothing to choose."""
