"""The tracker ``tensorboard``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.api import Context, Outcome, RunInfo, Tracker
from luthier_plugins.trackers.config import TensorBoardConfig
from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoard(Tracker[TensorBoardConfig]):
    """One scalar a metric and step, and the stage's config as text."""

    def __init__(self, config: TensorBoardConfig, context: Context) -> None:
        super().__init__(config, context)
        self._writer: SummaryWriter | None = None

    def start(self, run: RunInfo) -> None:
        if not run.resumed:
            for path in run.folder.glob("events.out.tfevents.*"):
                path.unlink()
        self._writer = SummaryWriter(str(run.folder), purge_step=run.step + 1 if run.resumed else None)
        self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._writer is not None, "a tracker is started before it logs"
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.add_text("outcome", outcome)
            self._writer.close()
