"""The worker process: imports the heavy libraries once and runs stages in turn.

Jobs come in on stdin, events go out on what was stdout; whatever libraries print goes to the log.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from queue import Queue
from typing import Any, Protocol, TextIO, cast

from luthier.api.artifact import REQUIRED_FACTS, Artifact, ArtifactKind
from luthier.api.component import Kind
from luthier.api.config import StageConfig, Use
from luthier.api.errors import Interrupted, LuthierError, ModelError, StageError, StoreError
from luthier.api.protocols import Tracker
from luthier.artifacts.store import Store
from luthier.registry import Registry, default_registry
from luthier.worker.job import Job

PROGRESS_EVERY = 0.2
LITTLE = 1 << 20
"""Bytes left on a disk that counts as full."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Listener(Protocol):
    """Where a context's events go, and who says that the user wants to stop."""

    def send(self, event: dict[str, Any]) -> None:
        """Take one event."""
        ...

    def stopping(self) -> bool:
        """Whether the user asked to stop."""
        ...


class Context:
    """The `StageContext` of one job."""

    def __init__(self, job: Job, registry: Registry, listener: Listener) -> None:
        self.stage = job.stage
        self.seed = job.seed
        self.out = Path(job.out)
        self.work = Path(job.work)
        self._job = job
        self._registry = registry
        self._listener = listener
        self._last_progress = 0.0
        self.warnings: list[str] = []
        self.trackers: list[Tracker] = []

    def input(self, field: str) -> Artifact:
        (artifact,) = self.inputs(field)
        return artifact

    def inputs(self, field: str) -> list[Artifact]:
        return [Artifact.load(Path(path)) for path in self._job.inputs.get(field, [])]

    def source(self, field: str) -> Path:
        (place,) = self.sources(field)
        return place

    def sources(self, field: str) -> list[Path]:
        places = self._job.sources.get(field, [])
        return [download(place) if place.startswith("hf:") else Path(place) for place in places]

    def component(self, use: Use) -> Any:
        return self._registry.impl_class(use.component)(use.config)

    def make(self, kind: Kind, name: str) -> Any:
        component = self._registry.get(kind, name)
        config = self._registry.config_class(component).model_validate({}, context={"components": self._registry})
        return self._registry.impl_class(component)(config)

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
        self._send("metrics", values=dict(values), step=step)
        for tracker in self.trackers:
            tracker.log(values, step)

    def log(self, message: str) -> None:
        self._send("log", message=message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._send("warning", message=message)

    def stopping(self) -> bool:
        return self._listener.stopping()

    def _send(self, event: str, **values: Any) -> None:
        self._listener.send({"event": event, "stage": self.stage, **values})


class Worker:
    """Runs the jobs that come in until stdin closes."""

    def __init__(self, events: TextIO) -> None:
        self.stop = threading.Event()
        self._events = events
        self._jobs: Queue[dict[str, Any]] = Queue()

    def send(self, event: dict[str, Any]) -> None:
        """Send one event to the runner."""
        self._events.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")
        self._events.flush()

    def stopping(self) -> bool:
        """Whether the runner asked for a checkpoint and the end."""
        return self.stop.is_set()

    def serve(self) -> None:
        """Run jobs in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        registry = default_registry()
        while True:
            self._run(Job(**self._jobs.get()), registry)

    def _read(self) -> None:
        for line in sys.stdin:
            self._jobs.put(json.loads(line))
        # The runner is gone (or is done): nobody would take a result, so do not go on.
        os._exit(0)

    def _run(self, job: Job, registry: Registry) -> None:
        started = time.perf_counter()
        try:
            component = registry.get("stage", job.component)
            config = cast(
                "StageConfig",
                registry.config_class(component).model_validate(job.config, context={"components": registry}),
            )
            context = Context(job, registry, self)
            shutil.rmtree(context.out, ignore_errors=True)
            context.out.mkdir(parents=True)
            context.trackers = _trackers(job, registry)
            stage = registry.impl_class(component)(config)
            seed_everything(job.seed)
            loaded = time.perf_counter()
            try:
                for tracker in context.trackers:
                    tracker.start(Path(job.run), job.stage)
                facts = stage.run(context)
                check_facts(facts, config.produces(job.kinds), str(registry.provider(component)))
            finally:
                for tracker in context.trackers:
                    tracker.finish()
        except Interrupted as error:
            self.send({"event": "interrupted", "stage": job.stage, "message": error.message})
        # Stages are plugins: whatever they raise is this stage's failure, not the worker's.
        except Exception as error:  # noqa: BLE001
            known = error if isinstance(error, LuthierError) else _disk_full(error, job)
            self.send(
                {
                    "event": "failed",
                    "stage": job.stage,
                    "known": known is not None,
                    "type": type(error).__name__,
                    "message": known.message if known else f"{type(error).__name__}: {error}",
                    "where": known.where if known else None,
                    "hint": known.hint if known else None,
                    "traceback": traceback.format_exc(),
                }
            )
        else:
            ended = time.perf_counter()
            self.send(
                {
                    "event": "result",
                    "stage": job.stage,
                    "facts": facts,
                    "warnings": context.warnings,
                    "seconds": {"load": loaded - started, "run": ended - loaded},
                }
            )


def check_facts(facts: Any, kind: ArtifactKind, provider: str) -> None:
    """Refuse facts that a manifest cannot hold, or that lack what every artifact of the kind tells.

    Raises:
        StageError: names what is missing, and whose stage it was.
    """
    problem = ""
    if not isinstance(facts, dict):
        problem = f"it returned {type(facts).__name__} instead of its facts"
    else:
        missing = [name for name in REQUIRED_FACTS[kind] if name not in facts]
        try:
            json.dumps(facts)
        except (TypeError, ValueError) as error:
            problem = f"its facts are no plain values: {error}"
        if missing:
            problem = f"its facts lack {', '.join(missing)}, which every {kind} tells"
    if problem:
        raise StageError(f"the stage of {provider} is at fault: {problem}", hint="tell its author")


def seed_everything(seed: int) -> None:
    """Seed every source of random numbers that is loaded, so that no stage depends on those that ran before it."""
    random.seed(seed)
    loaded: dict[str, Any] = dict(sys.modules)
    if "numpy" in loaded:
        loaded["numpy"].random.seed(seed % 2**32)
    if "torch" in loaded:
        loaded["torch"].manual_seed(seed)


def _disk_full(error: Exception, job: Job) -> StoreError | None:
    """The error to show when `error` says that nothing more can be written; None for all others.

    Libraries in Rust and C++ raise errors of their own with the system's number in the text.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    numbers = [item.errno for item in chain if isinstance(item, OSError)]
    told = any(f"os error {code}" in str(item) for item in chain for code in FULL)
    # torch's own writer says no more than that it could not write.
    silent = any("inline_container" in str(item) for item in chain) and shutil.disk_usage(job.work).free < LITTLE
    if not told and not silent and not any(number in FULL for number in numbers):
        return None
    return StoreError(
        f"the disk is full: {error}",
        where=job.work,
        hint="free some space (`luthier clean`) or choose another store with --store, then run again: "
        "what was finished is kept",
    )


def _trackers(job: Job, registry: Registry) -> list[Tracker]:
    made: list[Tracker] = []
    for raw in job.trackers:
        component = registry.get("tracker", raw["uses"])
        values = {key: value for key, value in raw.items() if key != "uses"}
        made.append(registry.impl_class(component)(registry.config_class(component).model_validate(values)))
    return made


def download(pinned: str) -> Path:
    """The local folder of a hub model at a pinned commit: safetensors, configs and tokenizer only.

    Raises:
        ModelError: the hub cannot be reached and the model is not in the local cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from luthier.artifacts.models import LICENCES

    repository, _, commit = pinned.removeprefix("hf:").partition("@")
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", *LICENCES]
    try:
        return Path(
            cast("Any", huggingface_hub).snapshot_download(repository, revision=commit, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"'{repository}' cannot be downloaded: {type(error).__name__}",
            hint="check the network, or give the path of a local folder",
        ) from error


def main() -> None:
    """Entry point of ``python -m luthier.worker.worker``."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(events)
    # Libraries make hundreds of thousands of objects that stay: looking through them again and again while they are
    # imported takes as much as a fifth of the time.
    gc.set_threshold(10_000)
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.serve()


if __name__ == "__main__":
    main()
