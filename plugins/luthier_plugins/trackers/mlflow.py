"""The tracker ``mlflow``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from luthier.api import Outcome, RunInfo
from luthier.artifacts.extras import needed
from luthier_plugins.trackers.config import MlflowConfig
from luthier_plugins.trackers.remote import RemoteTracker, flat

STATUS: Mapping[Outcome, str] = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
LONGEST = 6000
"""Characters of a parameter's value that MLflow takes."""


class Mlflow(RemoteTracker[MlflowConfig]):
    """A run of MLflow, at a server or in a database."""

    _client: Any = None
    _id = ""

    def open(self, run: RunInfo, name: str | None) -> str:
        tracking, entities = (
            needed("mlflow.tracking", "mlflow", "trackers"),
            needed("mlflow.entities", "mlflow", "trackers"),
        )
        self._metric = entities.Metric
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        uri = self.config.uri or f"sqlite:///{run.folder.parent / 'mlflow.db'}"
        self._client = tracking.MlflowClient(uri, registry_uri=uri)
        if name is not None:
            self._id = name
            self._client.update_run(name, status="RUNNING")
            return name
        wanted = self.config.experiment or run.recipe
        known = self._client.get_experiment_by_name(wanted)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(wanted)
        tags = {"luthier.key": run.key, "luthier.run": run.run, "luthier.uses": run.uses}
        self._id = self._client.create_run(experiment, run_name=run.stage, tags=tags).info.run_id
        params = [
            entities.Param(key, (value if isinstance(value, str) else json.dumps(value))[:LONGEST])
            for key, value in flat(run.config).items()
        ]
        self._client.log_batch(self._id, params=params)
        return self._id

    def send(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self, outcome: Outcome, summary: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, [self._metric(f"final.{name}", value, now, 0) for name, value in summary.items()]
        )
        self._client.set_tag(self._id, "outcome", outcome)
        self._client.set_terminated(self._id, STATUS[outcome])
