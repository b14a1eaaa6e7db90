"""The context of one job."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from luthier.api.artifact import Artifact
from luthier.api.errors import Interrupted, ModelError, PluginError, StageError
from luthier.artifacts.models import LICENCES
from luthier.artifacts.store import Store
from luthier.registry import Registry
from luthier.serving.access import PluginAccess
from luthier.worker.job import Job
from luthier.worker.tracking import Trackers

PROGRESS_EVERY = 0.2
HUB = "hf:"
WANTED = {
    "model": ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", *LICENCES],
    "dataset": ["README.md", *(f"*{ending}*" for ending in (".parquet", ".arrow", ".json", ".csv", ".tsv", ".txt"))],
}
"""The files that are downloaded of a repository."""


class Listener(Protocol):
    """Where a context's events go, and who says that the user wants to stop."""

    def send(self, event: dict[str, Any]) -> None:
        """Take one event."""
        ...

    def stopping(self) -> bool:
        """Whether the user asked to stop."""
        ...


class JobContext(PluginAccess):
    """The `luthier.api.StageContext` of one job."""

    def __init__(self, job: Job, registry: Registry, listener: Listener, *, rank: int = 0, world: int = 1) -> None:
        super().__init__(registry)
        self.stage = job.stage
        self.seed = job.seed
        self.date = None if job.date is None else datetime.date.fromisoformat(job.date)
        self.scratch = Path(job.scratch)
        self.cache = Store(Path(job.store)).cache
        self.rank = rank
        self.world = world
        self.preview = job.preview
        self._job = job
        self._listener = listener
        self._last_progress = 0.0
        self.warnings: list[str] = []
        self.trackers: Trackers | None = None

    @property
    def out(self) -> Path:
        if self.rank:
            raise StageError(f"rank {self.rank} asked for the artifact's folder: rank 0 alone writes it")
        return Path(self._job.out)

    @property
    def device(self) -> str:
        torch: Any = sys.modules.get("torch") or __import__("torch")
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.rank}" if self.world > 1 else "cuda"

    def artifact(self, value: str | None) -> Artifact:
        folder = self._job.artifacts.get(value) if value is not None else None
        if folder is None:
            raise self._unknown("artifact", value, "Input")
        return Artifact.intact(Path(folder))

    def path(self, value: str) -> Path:
        place = self._job.sources.get(value)
        if place is None:
            raise self._unknown("file", value, "Source")
        return download(place) if place.startswith(HUB) else Path(place)

    def _unknown(self, what: str, value: str | None, marker: str) -> PluginError:
        component = self._registry.get("stage", self._job.component)
        method = "path" if marker == "Source" else "artifact"
        return PluginError(
            f"{self._registry.provider(component)} asks for the {what} {value!r}, which no field of the config of "
            f"'{self.stage}' names",
            hint=f"mark the field with {marker}(...), and ask with its value: context.{method}(self.config.FIELD)",
        )

    def finished(self, path: Path) -> None:
        Store(Path(self._job.store)).digest_source(path)

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        if self.stopping():
            raise Interrupted("stopped on request")
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_EVERY or done == total:
            self._last_progress = now
            self._send("progress", done=done, total=total, unit=unit)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise StageError(
                    f"{name} is {value} at step {step}", hint="nothing that is computed from it would mean anything"
                )
        self._send("metrics", values=dict(values), step=step)
        if self.trackers is not None and not self.rank:
            self.trackers.log(values, step)

    def log(self, message: str) -> None:
        self._send("log", message=message)

    def warn(self, message: str) -> None:
        if not self.rank:
            self.warnings.append(message)
        self._send("warning", message=message)

    def stopping(self) -> bool:
        return self._listener.stopping()

    def _send(self, event: str, **values: Any) -> None:
        if not self.rank:
            self._listener.send({"event": event, "stage": self.stage, **values})


def download(pinned: str) -> Path:
    """The local folder of a hub model at a pinned commit: safetensors, configs and tokenizer only; or of a dataset: the
    files that hold rows, and its card, which says which of them belong together.

    Raises:
        ModelError: the hub cannot be reached and it is not in the local cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, commit = pinned.removeprefix(HUB).partition("@")
    name = repository.removeprefix("datasets/")
    kind = "model" if name == repository else "dataset"
    try:
        return Path(
            cast("Any", huggingface_hub).snapshot_download(
                name, revision=commit, repo_type=kind, allow_patterns=WANTED[kind]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"'{repository}' cannot be downloaded: {type(error).__name__}",
            hint="check the network, or give the path of a local folder",
        ) from error
