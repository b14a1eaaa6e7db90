"""The config of the stage ``sft``."""

from __future__ import annotations

from luthier.api import TuningConfig


class SftConfig(TuningConfig):
    """Trains the assistant's turns of conversations, stop token included."""
