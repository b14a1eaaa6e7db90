"""The tracker ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from luthier_plugins.trackers.config import TensorBoardConfig
from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoard:
    """One scalar a metric and step."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self._writer: SummaryWriter | None = None

    def start(self, folder: Path, stage: str) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard" / stage))

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._writer is not None, "a tracker is started before it logs"
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
