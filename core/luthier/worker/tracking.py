"""A stage's trackers: whatever one raises is reported under the name of its plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.api.context import Context
from luthier.api.errors import LuthierError, PluginError
from luthier.api.execution import Outcome, RunInfo, Tracker
from luthier.registry import Registry
from luthier.worker.environment import environment
from luthier.worker.job import Job


class Trackers:
    """The trackers of one job, started together.

    Raises:
        PluginError: one cannot be made or started.
    """

    def __init__(self, job: Job, registry: Registry, context: Context) -> None:
        self._started: list[tuple[Tracker[Any], str]] = []
        self._context = context
        if not job.trackers:
            return
        folder = Path(job.tracking)
        folder.mkdir(parents=True, exist_ok=True)
        info = RunInfo(
            run=job.run,
            recipe=job.recipe,
            stage=job.stage,
            uses=job.component,
            key=job.key,
            config=job.config,
            environment=environment(),
            resumed=job.step is not None,
            step=job.step or 0,
            folder=folder,
        )
        for given in job.trackers:
            use = registry.use("tracker", given)
            name = f"the tracker '{use.name}' of {registry.provider(use.component)}"
            tracker: Tracker[Any] = registry.build(use, context)
            try:
                tracker.start(info)
            # A tracker is foreign code: whatever it raises is reported under its name.
            except Exception as error:
                # Those that started before would show the stage as running for ever.
                self.finish("failed", {})
                if isinstance(error, LuthierError):
                    raise
                raise PluginError(f"{name} cannot start: {type(error).__name__}: {error}") from error
            self._started.append((tracker, name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand metrics to every tracker.

        Raises:
            PluginError: one fails.
        """
        for tracker, name in self._started:
            try:
                tracker.log(values, step)
            # See `__init__`.
            except Exception as error:
                raise PluginError(f"{name} cannot log: {type(error).__name__}: {error}") from error

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        """Give every tracker the outcome. A failure here does not fail the stage: the artifact is complete."""
        for tracker, name in self._started:
            try:
                tracker.finish(outcome, facts)
            except Exception as error:  # noqa: BLE001 - see `__init__`
                self._context.warn(f"{name} cannot finish: {type(error).__name__}: {error}")
        self._started = []
