"""The protocols of running: executors with their slots and sessions, and trackers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from luthier.api.component import C, Implementation

Event = dict[str, Any]
Outcome = Literal["done", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The stage whose metrics a tracker will get.

    Attributes:
        run: The run's id.
        recipe: The recipe's name.
        stage: The stage's id.
        uses: The name of the stage's component.
        key: The key of what it makes.
        config: The stage's config, as a recipe would write it.
        environment: Versions of the libraries and of Python, as manifests record them.
        resumed: Whether it goes on from a checkpoint: what `folder` holds belongs to it then.
        folder: A folder for this stage and key, the same in every run that works on it.
        step: The step of the checkpoint that it goes on from: what was logged of later steps is logged again.
    """

    run: str
    recipe: str
    stage: str
    uses: str
    key: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    resumed: bool
    folder: Path
    step: int = 0


class Tracker(Implementation[C]):
    """Kind ``tracker``: where metrics go while a stage runs, in the worker process."""

    def start(self, run: RunInfo) -> None:
        """A stage starts. What is raised here ends the stage before anything is computed."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of one step."""
        raise NotImplementedError

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        """The stage ended: how, and what its artifact's facts are (empty unless it is done)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A share of a machine that runs one stage at a time.

    Attributes:
        name: What messages call it.
        gpus: The numbers of its GPUs; none: it computes on the CPU, unless `all_gpus`.
        all_gpus: Whether it has every GPU of the machine.
    """

    name: str
    gpus: tuple[int, ...] = ()
    all_gpus: bool = False


class Session(Protocol):
    """A worker on a slot, as the runner sees it."""

    def send(self, job: Mapping[str, Any]) -> None:
        """Hand over a job; a worker that died meanwhile is reported through its events."""
        ...

    def events(self) -> Iterator[Event]:
        """Everything that the worker says, until it ends; last ``{"event": "died", "message": ..., "hint": ...}``."""
        ...

    def stop(self) -> None:
        """Ask for a checkpoint and the end of the running stage."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def close(self) -> None:
        """No more jobs: the worker ends."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerLaunch:
    """What starts a worker.

    Attributes:
        command: The command line.
        environment: All variables that it needs: nothing has to be added, and nothing may be left out.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)

    def on(self, slot: Slot) -> WorkerLaunch:
        """The same, with the slot's GPUs and no others to be seen."""
        if slot.all_gpus:
            return self
        visible = ",".join(str(number) for number in slot.gpus)
        return WorkerLaunch(self.command, {**self.environment, "CUDA_VISIBLE_DEVICES": visible})


class ExecutorContext(Protocol):
    """What an executor is made with: it lives in the process that drives the run."""

    @property
    def worker(self) -> WorkerLaunch:
        """How a worker is started."""
        ...


class Executor(Implementation[C]):
    """Kind ``executor``: where workers run. Made in the process that drives the run; its module loads no torch."""

    context: ExecutorContext  # type: ignore[assignment]

    def slots(self) -> Sequence[Slot]:
        """The slots that stages may run on, at least one; no two with the same GPU."""
        raise NotImplementedError

    def open(self, slot: Slot, log: Path) -> Session:
        """Start a worker on a slot; `ProcessSession` is a session with a command of this machine.

        Args:
            slot: One of `slots`; at most one session is open on it.
            log: The file for what the worker prints beside its events.
        """
        raise NotImplementedError


class ProcessSession:
    """A session with a child process: jobs go in as JSON lines, events come out as JSON lines.

    The child gets a session (process group) of its own, so that Ctrl-C in a terminal reaches the runner alone, which
    then asks the worker for a checkpoint.

    Args:
        launch: What to start, see `Executor.context`.
        log: The file for what it prints on stderr; appended to.
    """

    def __init__(self, launch: WorkerLaunch, log: Path) -> None:
        self._log = log
        with log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                list(launch.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(launch.environment),
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )

    def send(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[Event]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = _event_of(line)
            if event is not None:
                yield event
            else:
                # A launcher's banner, for instance.
                with self._log.open("a", encoding="utf-8") as log:
                    log.write(line)
        yield {"event": "died", **_exit_report(self._process.wait(), self._log)}

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        # The whole group: a worker that runs several ranks has children.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _event_of(line: str) -> Event | None:
    """The event that a line is; None for any other."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return cast("Event", found) if isinstance(found, dict) and "event" in found else None


def _exit_report(code: int, log: Path) -> dict[str, str]:
    """Why a worker ended, and what to do."""
    if code >= 0:
        return {"message": f"the worker ended with exit code {code}", "hint": f"its log: {log}"}
    name = signal.Signals(-code).name
    why = " (often a sign of too little memory)" if name == "SIGKILL" else ""
    return {
        "message": f"the worker was ended by {name}{why}",
        "hint": f"run again: finished stages are kept, training resumes from its checkpoint; log: {log}",
    }
