"""The configs of the metrics."""

from __future__ import annotations

from luthier.api import Field, MetricConfig


class ExactMatchConfig(MetricConfig):
    """What counts as equal."""

    strip: bool = True
    """Ignore white space at both ends."""
    ignore_case: bool = False
    """Ignore upper and lower case."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """The maximum number of tokens in an answer; by default what the stage says."""


class PerplexityConfig(MetricConfig):
    """Nothing to choose."""
