"""The configs of the trackers."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config


class JsonlConfig(Config):
    """Writes ``metrics.jsonl``, and ``run.json`` with what the stage was and how it ended."""


class TensorBoardConfig(Config):
    """Writes event files; look at them with ``tensorboard --logdir .luthier/tracking``."""


class WandbConfig(Config):
    """Weights & Biases."""

    project: str | None = None
    """The project; by default the recipe's name."""
    entity: str | None = None
    """The user or team that it belongs to; by default yours."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files, which `wandb sync` uploads."""


class MlflowConfig(Config):
    """MLflow."""

    uri: str | None = None
    """Where runs are kept, such as `http://localhost:5000`; by default a database beside the recipe's other metrics, to
    be looked at with `mlflow ui --backend-store-uri sqlite:///.luthier/tracking/RECIPE/mlflow.db`."""
    experiment: str | None = None
    """The experiment; by default the recipe's name."""


class TrackioConfig(Config):
    """Trackio; look at it with `trackio show`."""

    project: str | None = None
    """The project; by default the recipe's name."""
    space: str | None = None
    """The Space that it is sent to; by default it stays on this machine."""
