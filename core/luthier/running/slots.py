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
class OpenSlot:
    """A slot, and the session on it while there is one.

    Attributes:
        share: The slot as its executor gave it.
        on: The slot as the session sees it: without its GPUs where a stage wants none.
    """

    share: Slot
    session: Session | None = None
    busy: bool = False
    on: Slot | None = None


@dataclass(slots=True)
class OpenSlots:
    """All slots of a run, and the events of their sessions."""

    executor: Executor[Any]
    name: str
    folder: Path
    slots: list[OpenSlot]
    _events: queue.Queue[tuple[OpenSlot, Session, Event]] = field(
        default_factory=queue.Queue[tuple[OpenSlot, Session, Event]]
    )

    @classmethod
    def of(cls, use: Use, registry: Registry, folder: Path) -> OpenSlots:
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
        return cls(executor, name, folder, [OpenSlot(slot) for slot in slots])

    def free(self, resources: Resources) -> OpenSlot | None:
        """A free slot with the resources that a stage asks for."""
        return next((slot for slot in self.slots if not slot.busy and fits(slot.share, resources)), None)

    def possible(self, resources: Resources) -> bool:
        """Whether any slot has the resources that a stage asks for."""
        return any(fits(slot.share, resources) for slot in self.slots)

    def send(self, slot: OpenSlot, job: Job, resources: Resources) -> None:
        """Start a job on a free slot.

        Raises:
            PluginError: the executor cannot start a worker, or cannot reach it.
        """
        on = Slot(slot.share.name) if resources.gpus == 0 else slot.share
        if slot.session is not None and slot.on != on:
            # Which GPUs a process sees is settled when it starts.
            self._closed(slot)
        if slot.session is None:
            try:
                slot.session, slot.on = self.executor.open(on, self.log_of(slot)), on
            except LuthierError:
                raise
            # See `of`.
            except Exception as error:
                raise PluginError(
                    f"{self.name} cannot start a worker on {slot.share.name}: {type(error).__name__}: {error}"
                ) from error
            threading.Thread(target=self._listen, args=(slot, slot.session), daemon=True).start()
        try:
            slot.session.send(job.to_json())
        # See `of`.
        except Exception as error:
            raise PluginError(
                f"{self.name} cannot reach its worker on {slot.share.name}: {type(error).__name__}: {error}"
            ) from error
        slot.busy = True

    def stop(self, slot: OpenSlot) -> None:
        """Ask a slot's worker for a checkpoint and to end its stage; one that cannot be asked is ended."""
        if slot.session is not None:
            try:
                slot.session.stop()
            # See `of`.
            except Exception as error:  # noqa: BLE001
                self._lost(slot, slot.session, f"cannot stop its worker: {type(error).__name__}: {error}")

    def log_of(self, slot: OpenSlot) -> Path:
        """Where a slot's worker writes its output."""
        return self.folder / ("worker.log" if len(self.slots) == 1 else f"worker-{slot.share.name}.log")

    def _listen(self, slot: OpenSlot, session: Session) -> None:
        try:
            for event in session.events():
                self._events.put((slot, session, {**event, "event": event["event"]}))
                if event["event"] == "died":
                    return
            problem = "ended its events without saying how the worker died"
        # See `of`. Whatever it is, the stage has to end: nothing more will be heard of it.
        except Exception as error:  # noqa: BLE001
            problem = f"cannot read its worker's events: {type(error).__name__}: {error}"
        self._lost(slot, session, problem)

    def _lost(self, slot: OpenSlot, session: Session, problem: str) -> None:
        """End a worker that cannot be followed any more."""
        with suppress(Exception):
            session.kill()
        message = f"{self.name} {problem}"
        hint = f"report this to its author; the worker's log: {self.log_of(slot)}"
        self._events.put((slot, session, {"event": "died", "message": message, "hint": hint}))

    def next_event(self) -> tuple[OpenSlot, Event] | None:
        """The next event of any open session, or None after a moment without one."""
        try:
            slot, session, event = self._events.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        # What a session says after its end, such as that it ended, is of no interest.
        return (slot, event) if session is slot.session else None

    def kill(self) -> None:
        """End every worker now."""
        for slot in self.slots:
            if slot.session is not None:
                with suppress(Exception):
                    slot.session.kill()

    def close(self) -> None:
        """No more jobs."""
        for slot in self.slots:
            self._closed(slot)

    @staticmethod
    def _closed(slot: OpenSlot) -> None:
        session, slot.session = slot.session, None
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
