"""Drives a plan: stages whose inputs are ready run in parallel where there are slots, and go into the store."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.api.artifact import Artifact
from luthier.api.errors import Interrupted, LuthierError, Problem, RecipeError, StageError, StoreError
from luthier.api.execution import Event
from luthier.artifacts.store import Store
from luthier.planning import Node, Plan
from luthier.running.commit import adopt, commit
from luthier.running.events import Events, Listener
from luthier.running.jobs import job_of
from luthier.running.lock import Lock, is_held
from luthier.running.results import RunResult, StageResult
from luthier.running.signals import Signals
from luthier.running.slots import OpenSlot, OpenSlots
from luthier.worker.environment import environment
from luthier.worker.job import Job


@dataclass(slots=True)
class _Running:
    """A stage that a worker works on."""

    node: Node
    job: Job
    lock: Lock
    started: float
    asked_to_stop: bool = False


class Scheduler:
    """Runs one plan."""

    def __init__(self, the_plan: Plan, keep_going: bool, listeners: list[Listener]) -> None:
        self.plan = the_plan
        self.store = the_plan.store
        self.keep_going = keep_going
        self.id, self.folder = _new_run(self.store, the_plan.recipe.name)
        try:
            self.events = Events(self.folder / "events.jsonl", listeners)
        except OSError as error:
            raise StoreError(
                f"the store cannot be written: {error.strerror}",
                where=str(self.store.root),
                hint="choose another place with --store",
            ) from error
        self.results: dict[str, StageResult] = {}
        self.slots = OpenSlots.of(the_plan.recipe.executor, the_plan.recipe.registry, self.folder)
        self._running: dict[OpenSlot, _Running] = {}
        self._locks: dict[str, Lock] = {}
        self._again: list[Node] = []
        """Stages whose artifacts turned out to be damaged: they are made again, ..."""
        self._remade: set[str] = set()
        """... but only once in a run."""
        self._news = False
        """Whether something was made since it was last looked at what that means for the stages behind it."""
        self.interrupts = 0

    def run(self, only: Sequence[str]) -> RunResult:
        """Make these stages and what they need; by default all."""
        wanted = self.plan.needed_for(only or self.plan.nodes)
        self._check_resources(wanted)
        waiting = [node for node in self.plan.nodes.values() if node.id in wanted]
        plan = {node.id: _told_of(node) for node in waiting}
        self.events("run_started", run=self.id, recipe=self.plan.recipe.name, stages=sorted(wanted), plan=plan)
        with Signals(self._interrupt):
            try:
                while waiting or self._running:
                    self._look_ahead(waiting)
                    waiting = [node for node in waiting if not self._advance(node)]
                    waiting, self._again = [*self._again, *waiting], []
                    if self._running or waiting:
                        self._handle_event()
            finally:
                # In this order: what a worker still writes is its own as long as the lock is held.
                self.slots.close()
                for running in self._running.values():
                    running.lock.release()
                result = RunResult(self.id, self.plan, self.results, self.interrupts > 0)
                self.events("run_finished", run=self.id, exit_code=result.exit_code)
                self.events.close()
        # In the order of the plan, whichever finished first.
        ordered = {name: self.results[name] for name in self.plan.nodes if name in self.results}
        return RunResult(self.id, self.plan, ordered, self.interrupts > 0)

    def _check_resources(self, wanted: set[str]) -> None:
        """Refuse what no slot could ever run, before anything is."""
        problems = [
            Problem(
                f"the stage '{name}' asks for {node.config.resources.gpus} GPUs, and no slot of the executor "
                f"'{self.plan.recipe.executor.name}' has that many",
                hint="give the executor more, or ask for fewer under `resources`",
            )
            for name, node in self.plan.nodes.items()
            if name in wanted and self.store.find(node.key) is None and not self.slots.possible(node.config.resources)
        ]
        if problems:
            raise RecipeError(problems)

    def _look_ahead(self, waiting: Sequence[Node]) -> None:
        """Fail stages of which it is known by now that they cannot be made, before others are paid for in vain."""
        if not self._news:
            return
        self._news = False
        for node in waiting:
            problems = self.plan.input_problems(node) if self.store.find(node.key) is None else []
            if problems and node.id not in self.results:
                self._settle(self._failed(node, StageError("; ".join(problems))), time.perf_counter())

    # -- what is next ------------------------------------------------------------------------------

    def _advance(self, node: Node) -> bool:
        """Start, skip or finish a waiting stage if that can be done now; whether it need not wait any more."""
        if node.id in self.results:
            return True
        broken = [
            name
            for name, stage in self.results.items()
            if stage.outcome not in ("cached", "done") or any(not gate.ok for gate in stage.gates)
        ]
        blocked = [name for name in node.waits_for if name in broken]
        if self.interrupts or blocked or (broken and not self.keep_going):
            self.results[node.id] = StageResult(node, "skipped")
            self.events("stage_skipped", stage=node.id, because=blocked or broken)
            return True
        if any(name in self.plan.nodes and name not in self.results for name in node.waits_for):
            return False
        started = time.perf_counter()
        try:
            return self._begin(node, started)
        except LuthierError as error:
            self._settle(self._failed(node, error), started)
            return True

    def _begin(self, node: Node, started: float) -> bool:
        """Take a stage from the store, or start it; whether that was possible now."""
        cached = self._usable(node)
        if cached is not None:
            self._give_up_lock(node)
            self._tidy(node)
            self._settle(self._cached(node, cached), started)
            return True
        if self._remakes_inputs(node):
            return False
        if any(running.node.key == node.key for running in self._running.values()):
            # The same stage under another name: it will be in the store.
            return False
        slot = self.slots.free(node.config.resources)
        if slot is None:
            return False
        lock = self._locks.setdefault(
            node.key, Lock(self.store.locks, node.key, lambda text: self.events("log", stage=node.id, message=text))
        )
        if not lock.acquire():
            return False
        try:
            # Another run may have finished it meanwhile.
            cached = self.store.find(node.key)
            if cached is not None:
                lock.release()
                self._settle(self._cached(node, cached), started)
                return True
            self._check_inputs(node)
            self.events("stage_started", stage=node.id, key=node.key, status=node.status, reason=node.reason)
            self.plan.recipe.registry.notify("luthier_stage_started", stage=node.id, key=node.key)
            job = self._job(node)
            self.slots.send(slot, job, node.config.resources)
        except BaseException:
            lock.release()
            self._give_up_lock(node)
            raise
        self._running[slot] = _Running(node, job, lock, started)
        return True

    def _usable(self, node: Node) -> Artifact | None:
        """A stage's artifact, where it is in the store and what it was."""
        found = self.store.find(node.key)
        problem = self.store.broken(node.key) if found is None else self.store.damage(found)
        if problem:
            self._distrust(node, problem)
            return None
        if found is not None and node.config.unfit(found):
            self.store.discard(node.key)
            return None
        return found

    def _distrust(self, node: Node, problem: str) -> None:
        """Have a stage made again whose artifact is damaged.

        Raises:
            StoreError: it was made in this run already.
        """
        message = f"the artifact of '{node.id}' is damaged: {problem}"
        if node.id in self._remade or any(running.node.key == node.key for running in self._running.values()):
            raise StoreError(message, where=str(self.store.folder(node.key)), hint="is the disk failing?")
        self._remade.add(node.id)
        self.events("warning", stage=node.id, message=f"{message}; it is made again")
        self.store.discard(node.key)

    def _remakes_inputs(self, node: Node) -> bool:
        """Whether a stage has to wait until what it reads, or what that sits on, is made again.

        Raises:
            StoreError: it is damaged, and no stage of the recipe makes it.
        """
        makers = {other.key: other for other in self.plan.nodes.values()}
        for name in (name for names in node.inputs.values() for name in names):
            key, artifact = self.plan.key_of(name), self.plan.artifact_of(name)
            problem = self._damage(artifact, key)
            if problem is None and artifact is not None and artifact.kind == "adapter":
                key = str(artifact.facts["base"])
                under = self.store.find(key)
                # Outside of the store, an adapter brings its base.
                problem = self._damage(under, key) if artifact.path.parent == self.store.artifacts else None
            if problem is None:
                continue
            maker = makers.get(key)
            if maker is None:
                raise StoreError(
                    f"an artifact that '{node.id}' reads is damaged: {problem}",
                    where=str(self.store.folder(key)),
                    hint="run the recipe again that made it",
                )
            self._distrust(maker, problem)
            self.results.pop(maker.id, None)
            self._again.append(maker)
            return True
        return False

    def _damage(self, artifact: Artifact | None, key: str) -> str | None:
        return (self.store.broken(key) or "it has vanished") if artifact is None else self.store.damage(artifact)

    def _tidy(self, node: Node) -> None:
        """Remove what a run left that was ended between the last two steps of storing an artifact."""
        work = self.store.work(node.key)
        if work.exists() and not is_held(self.store.locks / f"{node.key}.lock"):
            shutil.rmtree(work, ignore_errors=True)

    def _give_up_lock(self, node: Node) -> None:
        self._locks.pop(node.key, None)

    def _cached(self, node: Node, artifact: Artifact) -> StageResult:
        self.events("stage_cached", stage=node.id, key=node.key)
        for name in node.changed_code:
            self.events(
                "warning",
                stage=node.id,
                message=f"the code of {name} changed since this was made, and its revision did not: it stays cached "
                "until the revision rises",
            )
        return StageResult(node, "cached", artifact=artifact)

    def _failed(self, node: Node, error: LuthierError) -> StageResult:
        if isinstance(error, Interrupted):
            self.events("stage_interrupted", stage=node.id, message=error.message)
            return StageResult(node, "interrupted", error=error)
        self.events(
            "stage_failed", stage=node.id, key=node.key, message=error.message, where=error.where, hint=error.hint
        )
        self.plan.recipe.registry.notify("luthier_stage_failed", stage=node.id, key=node.key, error=str(error))
        return StageResult(node, "failed", error=error)

    def _settle(self, result: StageResult, started: float) -> None:
        """Keep how a stage ended, and judge what it made."""
        result.seconds = time.perf_counter() - started
        self.results[result.node.id] = result
        self._news = self._news or result.outcome == "done"
        # At once, so that `clean` in another terminal sees that the artifact is needed.
        self._remember()
        if result.artifact is None:
            return
        result.gates = result.node.config.gates(result.artifact.facts)
        for gate in result.gates:
            self.events(
                "gate",
                stage=result.node.id,
                metric=gate.metric,
                required=gate.required,
                value=gate.value,
                ok=gate.ok,
            )

    # -- what a worker is given --------------------------------------------------------------------

    def _check_inputs(self, node: Node) -> None:
        facts = {path: [self._input(name).facts for name in names] for path, names in node.inputs.items()}
        problems = node.config.input_problems(facts)
        if problems:
            raise StageError("; ".join(problems))

    def _input(self, name: str) -> Artifact:
        found = self.plan.artifact_of(name)
        if found is None:
            raise StoreError(f"the artifact of '{name}' has vanished from the store", hint="run again")
        return found

    def _adopted(self, node: Node, name: str) -> Artifact:
        """An input; a model from outside is put into the store when an adapter in it will sit on it."""
        artifact = self._input(name)
        if name in self.plan.outside and artifact.kind in ("model", "adapter"):
            if artifact.kind == "adapter":
                adopt(self.store, artifact.base)
            elif node.produces == "adapter":
                adopt(self.store, artifact)
        return artifact

    def _check_sources(self, node: Node) -> None:
        """Refuse a file that is not what it was when the key was made from it."""
        for source in (source for sources in node.sources.values() for source in sources):
            if not source.unchanged(self.store):
                raise StageError(
                    "the source changed during the run",
                    where=source.place,
                    hint="run again: it will be read again",
                )

    def _job(self, node: Node) -> Job:
        artifacts = {name: self._adopted(node, name) for name in node.names.values()}
        artifacts |= {name: self._input(name) for name in node.tests.values()}
        self._check_sources(node)
        return job_of(self.plan, node, self.id, artifacts)

    # -- what workers say --------------------------------------------------------------------------

    def _handle_event(self) -> None:
        """Take the next event of any worker."""
        for slot, running in self._running.items():
            if self.interrupts and not running.asked_to_stop and slot.session is not None:
                running.asked_to_stop = True
                self.slots.stop(slot)
        received = self.slots.next_event()
        if received is None:
            return
        slot, event = received
        running = self._running.get(slot)
        kind = event.pop("event")
        if kind == "died":
            slot.session = None
        if running is None:
            return
        if kind in ("result", "interrupted", "failed", "died"):
            del self._running[slot]
            slot.busy = False
            try:
                result = self._ended(kind, event, running, slot)
            except LuthierError as error:
                result = self._failed(running.node, error)
            finally:
                running.lock.release()
                self._give_up_lock(running.node)
            self._settle(result, running.started)
            return
        if kind == "metrics":
            self.plan.recipe.registry.notify(
                "luthier_metrics_logged", stage=running.node.id, metrics=event["values"], step=event["step"]
            )
        self.events(kind, **event)

    def _ended(self, kind: str, event: Event, running: _Running, slot: OpenSlot) -> StageResult:
        """How a stage ended, its artifact in the store.

        Raises:
            LuthierError: it has none.
        """
        node = running.node
        if kind == "interrupted":
            raise Interrupted(event["message"], hint="run again to continue from the last checkpoint")
        if kind == "died":
            if self.interrupts:
                raise Interrupted("stopped at once", hint="run again to continue from the last checkpoint")
            raise StageError(event["message"], where=node.id, hint=event["hint"])
        if kind == "failed":
            log = self.slots.log_of(slot)
            with log.open("a", encoding="utf-8") as file:
                file.write(event["traceback"])
            hint = event["hint"] or (None if event["known"] else f"the log has the traceback: {log}")
            raise StageError(event["message"], where=event["where"] or node.id, hint=hint)
        artifact = self._commit(node, running, event)
        self.events("stage_finished", stage=node.id, key=node.key, seconds=artifact.manifest["seconds"])
        self.plan.recipe.registry.notify(
            "luthier_stage_finished", stage=node.id, key=node.key, manifest=artifact.manifest
        )
        return StageResult(node, "done", artifact=artifact)

    def _commit(self, node: Node, running: _Running, answer: Event) -> Artifact:
        self._check_sources(node)
        for name in (name for names in node.inputs.values() for name in names):
            # Whatever was read after it vanished was read in part; what it refers to may have changed.
            problem = self._damage(self.plan.artifact_of(name), self.plan.key_of(name))
            if problem is not None:
                raise StoreError(
                    f"the artifact of '{name}' was removed or damaged while '{node.id}' read it: {problem}",
                    where=str(self.store.root),
                    hint="nothing was stored; run again",
                )
        about: dict[str, Any] = {
            "stage": node.id,
            "component": {
                "kind": "stage",
                "name": node.component.name,
                "revision": node.component.revision,
                "provider": str(self.plan.recipe.registry.provider(node.component)),
            },
            "facts": answer["facts"],
            "warnings": answer["warnings"],
            "config": running.job.config,
            "payload": node.payload,
            "code": node.code,
            "inputs": {path: [self.plan.key_of(name) for name in names] for path, names in node.inputs.items()},
            "seconds": {**answer["seconds"], "total": time.perf_counter() - running.started},
            "environment": environment(),
        }
        return commit(self.store, node.key, node.produces, Path(running.job.out), about)

    # -- beside ------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        self.interrupts += 1
        if self.interrupts == 1:
            self.events("log", message="stopping after a checkpoint; press Ctrl-C again to stop at once")
        else:
            self.slots.kill()

    def _remember(self) -> None:
        """Keep each stage's key payload, so that the next plan can say what changed."""
        done = {name: stage.node.payload for name, stage in self.results.items() if stage.artifact is not None}
        path = self.store.root / "refs" / f"{self.plan.recipe.name}.json"
        # A stage that the recipe has no more is forgotten, so that `clean` can free what it made.
        last = self.store.last_keys(self.plan.recipe.name)
        known = {name: payload for name, payload in last.items() if name in self.plan.nodes}
        if known == last and all(known.get(name) == payload for name, payload in done.items()):
            return
        # The artifacts are safe already; a full disk only costs the next plan its reasons.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({**known, **done}), encoding="utf-8")
            temporary.replace(path)


def _new_run(store: Store, recipe: str) -> tuple[str, Path]:
    """The id of a new run, and its folder, which no other run has."""
    try:
        # A link to nowhere is there, and is no folder.
        store.runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the store cannot be written: {error.strerror}",
            where=str(store.root),
            hint="is it a file, or a link to a folder that is gone? choose another place with --store",
        ) from error
    head = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe}-{os.getpid()}"
    for number in itertools.count():
        name = f"{head}-{number}" if number else head
        try:
            (store.runs / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(
                f"the store cannot be written: {error.strerror}",
                where=str(store.root),
                hint="choose another place with --store",
            ) from error
        return name, store.runs / name
    raise AssertionError("itertools.count never ends")


def _told_of(node: Node) -> dict[str, Any]:
    """What a run's events say of a stage before it begins: what its report is drawn from."""
    return {
        "uses": node.component.name,
        "produces": node.produces,
        "key": node.key,
        "waits_for": node.waits_for,
        "config": node.config.model_dump(mode="json"),
    }
