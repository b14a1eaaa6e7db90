"""The configs of the trackers."""

from __future__ import annotations

from luthier.api import Config


class JsonlConfig(Config):
    """Writes ``metrics.jsonl``, and ``run.json`` with what the stage was and how it ended."""


class TensorBoardConfig(Config):
    """Writes event files; look at them with ``tensorboard --logdir .luthier/tracking``."""
