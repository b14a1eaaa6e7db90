"""The configs of the trackers."""

from __future__ import annotations

from luthier.api import Config


class JsonlConfig(Config):
    """Writes ``metrics/<stage>.jsonl``."""


class TensorBoardConfig(Config):
    """Writes ``tensorboard/<stage>/``; look at it with ``tensorboard --logdir``."""
