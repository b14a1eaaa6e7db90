"""The configs of the generators."""

from __future__ import annotations

from typing import Annotated

from luthier.api import Config, Field, Input


class ModelGeneratorConfig(Config):
    """Something that a recipe makes."""

    model: Annotated[str, Input(("model", "adapter", "export"))]
    """The model or adapter, computed by transformers; or an export, asked in the program it is made for."""
    variant: str | None = None
    """Which file of an export; by default its last."""


class UrlConfig(Config):
    """A running server. What it answers is not part of any key: artifacts stay cached when the server changes."""

    url: str = Field(pattern=r"https?://.+")
    """Its address, with or without ``/v1``."""
    model: str | None = None
    """What it calls the model; by default its first."""
