"""The tracker ``wandb``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.api import Outcome, RunInfo
from luthier.artifacts.extras import needed
from luthier_plugins.trackers.config import WandbConfig
from luthier_plugins.trackers.remote import RemoteTracker, fresh_name


class Wandb(RemoteTracker[WandbConfig]):
    """A run of Weights & Biases."""

    _run: Any = None

    def open(self, run: RunInfo, name: str | None) -> str:
        wandb = needed("wandb", "wandb", "trackers")
        name = name or fresh_name(run)
        self._run = wandb.init(
            project=self.config.project or run.recipe,
            entity=self.config.entity,
            mode=self.config.mode,
            id=name,
            name=run.stage,
            group=run.recipe,
            job_type=run.uses,
            resume="allow",
            dir=str(run.folder),
            config={**run.config, "luthier": {"key": run.key, "run": run.run, "environment": dict(run.environment)}},
            settings=wandb.Settings(silent=True, console="off"),
        )
        return name

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, outcome: Outcome, summary: Mapping[str, float]) -> None:
        self._run.summary.update({**summary, "outcome": outcome})
        self._run.finish(exit_code=0 if outcome == "done" else 1)
