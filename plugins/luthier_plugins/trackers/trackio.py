"""The tracker ``trackio``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from luthier.api import Outcome, RunInfo
from luthier.artifacts.extras import needed
from luthier_plugins.trackers.config import TrackioConfig
from luthier_plugins.trackers.remote import RemoteTracker, flat, fresh_name


class Trackio(RemoteTracker[TrackioConfig]):
    """A run of Trackio, on this machine or in a Space."""

    _run: Any = None

    def open(self, run: RunInfo, name: str | None) -> str:
        trackio = needed("trackio", "trackio", "trackers")
        name = name or fresh_name(run)
        # It prints where to look.
        with redirect_stdout(StringIO()):
            self._run = trackio.init(
                project=self.config.project or run.recipe,
                name=name,
                group=run.stage,
                space_id=self.config.space,
                config={**flat(run.config), "luthier.key": run.key, "luthier.uses": run.uses},
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        return name

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, outcome: Outcome, summary: Mapping[str, float]) -> None:
        with redirect_stdout(StringIO()):
            self._run.log({f"final/{name}": value for name, value in summary.items()} | {"outcome": outcome})
            self._run.finish()
