"""The slots of an executor, each with its session: what a scheduler sends jobs to and gets events from."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from luthier.api.config import Resources, Use
from luthier.api.errors import LuthierError, PluginError
from luthier.api.execution import Event, Executor, Session, Slot, WorkerLaunch
from luthier.registry import Registry
from luthier.worker.job import Job

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
ALLOCATOR = {
    # glibc gives tensors of 128 KB and more back to the system at once, and requests them again for the next operation;
    # clearing these pages again and again takes up to a tenth of a small model's training.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_TOP_PAD_": str(4 << 20),
}  # fmt: skip
PATIENCE = 0.2
"""Seconds to wait for an event before the scheduler checks for work again."""


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What an executor is made with."""

    worker: WorkerLaunch


def worker_launch() -> WorkerLaunch:
    """How a worker is started on this machine."""
    command = [sys.executable, "-m", "luthier.worker.worker"]
    return WorkerLaunch(command, {**QUIET, **ALLOCATOR, **os.environ})


@dataclass(slots=True, eq=False)
class Lane:
    """A slot, and the session on it while there is one.

    Attributes:
        on: The slot as the session sees it: without its GPUs where a stage wants none.
    """

    slot: Slot
    session: Session | None = None
    busy: bool = False
    on: Slot | None = None


@dataclass(slots=True)
class Lanes:
    """All slots of a run, and the events of their sessions."""

    executor: Executor[Any]
    name: str
    folder: Path
    lanes: list[Lane]
    _events: queue.Queue[tuple[Lane, Session, Event]] = field(default_factory=queue.Queue[tuple[Lane, Session, Event]])

    @classmethod
    def of(cls, use: Use, registry: Registry, folder: Path) -> Lanes:
        """The slots of a recipe's executor.

        Raises:
            PluginError: the executor cannot be made, or its slots are not valid.
        """
        executor = cast("Executor[Any]", registry.build(use, LaunchContext(worker_launch())))
        name = f"the executor '{use.name}' of {registry.provider(use.component)}"
        try:
            slots = list(executor.slots())
        except LuthierError:
            raise
        # An executor is foreign code: whatever it raises is reported under its name.
        except Exception as error:
            raise PluginError(f"{name} cannot list its slots: {type(error).__name__}: {error}") from error
        check_slots(slots, name)
        return cls(executor, name, folder, [Lane(slot) for slot in slots])

    def free(self, resources: Resources) -> Lane | None:
        """A free slot with the resources that a stage asks for."""
        return next((lane for lane in self.lanes if not lane.busy and fits(lane.slot, resources)), None)

    def possible(self, resources: Resources) -> bool:
        """Whether any slot has the resources that a stage asks for."""
        return any(fits(lane.slot, resources) for lane in self.lanes)

    def send(self, lane: Lane, job: Job, resources: Resources) -> None:
        """Start a job on a free slot.

        Raises:
            PluginError: the executor cannot start a worker, or cannot reach it.
        """
        on = Slot(lane.slot.name) if resources.gpus == 0 else lane.slot
        if lane.session is not None and lane.on != on:
            # Which GPUs a process sees is settled when it starts.
            self._closed(lane)
        if lane.session is None:
            try:
                lane.session, lane.on = self.executor.open(on, self.log_of(lane)), on
            except LuthierError:
                raise
            # See `of`.
            except Exception as error:
                raise PluginError(
                    f"{self.name} cannot start a worker on {lane.slot.name}: {type(error).__name__}: {error}"
                ) from error
            threading.Thread(target=self._listen, args=(lane, lane.session), daemon=True).start()
        try:
            lane.session.send(job.to_json())
        # See `of`.
        except Exception as error:
            raise PluginError(
                f"{self.name} cannot reach its worker on {lane.slot.name}: {type(error).__name__}: {error}"
            ) from error
        lane.busy = True

    def stop(self, lane: Lane) -> None:
        """Ask a slot's worker for a checkpoint and to end its stage; one that cannot be asked is ended."""
        if lane.session is not None:
            try:
                lane.session.stop()
            # See `of`.
            except Exception as error:  # noqa: BLE001
                self._lost(lane, lane.session, f"cannot stop its worker: {type(error).__name__}: {error}")

    def log_of(self, lane: Lane) -> Path:
        """Where a lane's worker writes its output."""
        return self.folder / ("worker.log" if len(self.lanes) == 1 else f"worker-{lane.slot.name}.log")

    def _listen(self, lane: Lane, session: Session) -> None:
        try:
            for event in session.events():
                self._events.put((lane, session, {**event, "event": event["event"]}))
                if event["event"] == "died":
                    return
            problem = "ended its events without saying how the worker died"
        # See `of`. Whatever it is, the stage has to end: nothing more will be heard of it.
        except Exception as error:  # noqa: BLE001
            problem = f"cannot read its worker's events: {type(error).__name__}: {error}"
        self._lost(lane, session, problem)

    def _lost(self, lane: Lane, session: Session, problem: str) -> None:
        """End a worker that cannot be followed any more."""
        with suppress(Exception):
            session.kill()
        message = f"{self.name} {problem}"
        hint = f"report this to its author; the worker's log: {self.log_of(lane)}"
        self._events.put((lane, session, {"event": "died", "message": message, "hint": hint}))

    def next_event(self) -> tuple[Lane, Event] | None:
        """The next event of any open session, or None after a moment without one."""
        try:
            lane, session, event = self._events.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        # What a session says after its end, such as that it ended, is of no interest.
        return (lane, event) if session is lane.session else None

    def kill(self) -> None:
        """End every worker now."""
        for lane in self.lanes:
            if lane.session is not None:
                with suppress(Exception):
                    lane.session.kill()

    def close(self) -> None:
        """No more jobs."""
        for lane in self.lanes:
            self._closed(lane)

    @staticmethod
    def _closed(lane: Lane) -> None:
        session, lane.session = lane.session, None
        if session is not None:
            try:
                session.close()
            # A worker that does not end when it is asked to is ended.
            except Exception:  # noqa: BLE001
                with suppress(Exception):
                    session.kill()


def fits(slot: Slot, resources: Resources) -> bool:
    """Whether a slot has what a stage wants."""
    return slot.all_gpus or len(slot.gpus) >= (resources.gpus or 0)


def check_slots(slots: Sequence[Slot], name: str) -> None:
    """Refuse slots that two stages could not use side by side.

    Raises:
        PluginError: names the executor.
    """
    if not slots:
        raise PluginError(f"{name} has no slots: nothing could run", hint="give it at least one")
    names = [slot.name for slot in slots]
    twice = sorted({item for item in names if names.count(item) > 1})
    if twice:
        raise PluginError(f"{name} has two slots called '{twice[0]}'", hint="give each its own name")
    owners: dict[int, str] = {}
    for slot in slots:
        for gpu in slot.gpus:
            if gpu in owners:
                raise PluginError(
                    f"{name} gives GPU {gpu} to two slots, {owners[gpu]} and {slot.name}",
                    hint="a GPU belongs to one slot: stages on both would share its memory",
                )
            owners[gpu] = slot.name
    if len(slots) > 1 and any(slot.all_gpus for slot in slots):
        raise PluginError(f"{name} has a slot with all GPUs beside others", hint="divide them among the slots")
