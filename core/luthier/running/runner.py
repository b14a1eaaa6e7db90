"""Drives a plan: one stage after the other, in a worker process, into the store."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from luthier.api.artifact import Artifact
from luthier.api.config import Gate, dump_use
from luthier.api.errors import Interrupted, LuthierError, Problem, RecipeError, StageError, StoreError
from luthier.api.protocols import Executor
from luthier.artifacts.store import Store
from luthier.planning import Node, Plan, plan
from luthier.recipe import Recipe
from luthier.recipe.problems import near
from luthier.running.commit import adopt, commit, environment
from luthier.running.events import Event, Events, Listener
from luthier.running.lock import Lock
from luthier.running.process import WorkerProcess
from luthier.worker.job import Job

Outcome = Literal["cached", "done", "failed", "skipped", "interrupted"]


@dataclass(slots=True)
class StageResult:
    """How one stage of a run ended."""

    node: Node
    outcome: Outcome
    seconds: float = 0.0
    artifact: Artifact | None = None
    error: LuthierError | None = None
    gates: list[Gate] = field(default_factory=list[Gate])


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    id: str
    plan: Plan
    stages: dict[str, StageResult]
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0 done, 1 a stage failed, 3 a gate did not hold, 130 interrupted."""
        outcomes = [stage.outcome for stage in self.stages.values()]
        # A stage that was quicker than the signal is done; those behind it are not.
        if "interrupted" in outcomes or (self.stopped and "skipped" in outcomes):
            return 130
        if "failed" in outcomes:
            return 1
        return 3 if any(not gate.ok for stage in self.stages.values() for gate in stage.gates) else 0

    def artifact(self, stage: str) -> Artifact:
        """The artifact of a stage.

        Raises:
            StageError: the stage has none, because it failed or was not reached.
        """
        result = self.stages.get(stage)
        if result is None or result.artifact is None:
            why = result.outcome if result else "it was not asked for" if stage in self.plan.nodes else "there is none"
            raise StageError(f"the stage '{stage}' made no artifact in this run ({why})")
        return result.artifact


def run(
    recipe: Recipe | Plan | str | Path,
    *,
    store: Store | str | Path | None = None,
    only: str | Sequence[str] = (),
    keep_going: bool = False,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Run a recipe: what is cached is not run again, what was interrupted resumes.

    Args:
        recipe: A recipe, its path, or a plan made from it.
        store: Where artifacts are kept; see `Store.at`.
        only: The stage or stages to make, with what they need; by default all.
        keep_going: After a failure, still run the stages that do not depend on it.
        listeners: Called with every event.

    Raises:
        PluginError: a tool with an environment of its own is not installed.
        RecipeError: the recipe is wrong, or `only` names a stage that is not in it. A failed stage does not raise: see
            `RunResult`.
    """
    the_plan = recipe if isinstance(recipe, Plan) else plan(recipe, store)
    wanted = [only] if isinstance(only, str) else list(only)
    problems = [
        Problem(f"there is no stage '{name}'", hint=near(name, the_plan.nodes))
        for name in wanted
        if name not in the_plan.nodes
    ]
    if problems:
        raise RecipeError(problems)
    # Before the first stage, not after hours of training.
    for tool in the_plan.missing_tools(wanted):
        raise tool.missing()
    return _Runner(the_plan, keep_going, list(listeners)).run(wanted)


class _Runner:
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
        self.worker: WorkerProcess | None = None
        self.interrupts = 0

    def run(self, only: Sequence[str]) -> RunResult:
        wanted = self.plan.needed_for(only or self.plan.nodes)
        self.events("run_started", run=self.id, recipe=self.plan.recipe.name, stages=sorted(wanted))
        with _Signals(self._interrupt):
            try:
                for node in self.plan.nodes.values():
                    if node.id in wanted:
                        self._visit(node)
            finally:
                if self.worker is not None:
                    self.worker.close()
                result = RunResult(self.id, self.plan, self.results, self.interrupts > 0)
                self.events("run_finished", run=self.id, exit_code=result.exit_code)
                self.events.close()
        return result

    def _visit(self, node: Node) -> None:
        broken = [
            name
            for name, stage in self.results.items()
            if stage.outcome not in ("cached", "done") or any(not gate.ok for gate in stage.gates)
        ]
        blocked = [name for name in node.needs if name in broken]
        if self.interrupts or blocked or (broken and not self.keep_going):
            self.results[node.id] = StageResult(node, "skipped")
            self.events("stage_skipped", stage=node.id, because=blocked or broken)
            return
        started = time.perf_counter()
        try:
            result = self._make(node)
        except Interrupted as error:
            result = StageResult(node, "interrupted", error=error)
            self.events("stage_interrupted", stage=node.id, message=error.message)
        except LuthierError as error:
            result = StageResult(node, "failed", error=error)
            self.events(
                "stage_failed", stage=node.id, key=node.key, message=error.message, where=error.where, hint=error.hint
            )
            self.plan.recipe.registry.notify("luthier_stage_failed", stage=node.id, key=node.key, error=str(error))
        result.seconds = time.perf_counter() - started
        self.results[node.id] = result
        # At once, so that `clean` in another terminal sees that the artifact is needed.
        self._remember()
        if result.artifact is not None:
            self._judge(result, result.artifact)

    def _judge(self, result: StageResult, artifact: Artifact) -> None:
        result.gates = result.node.config.gates(artifact.facts)
        for gate in result.gates:
            self.events(
                "gate", stage=result.node.id, metric=gate.metric, required=gate.required, value=gate.value, ok=gate.ok
            )

    def _make(self, node: Node) -> StageResult:
        cached = self.store.find(node.key)
        if cached is not None:
            self.events("stage_cached", stage=node.id, key=node.key)
            return StageResult(node, "cached", artifact=cached)
        lock = Lock(self.store.locks, node.key, lambda text: self.events("log", stage=node.id, message=text))
        with lock.held(self._poll):
            # Another run may have finished it while this one waited.
            cached = self.store.find(node.key)
            if cached is not None:
                self.events("stage_cached", stage=node.id, key=node.key)
                return StageResult(node, "cached", artifact=cached)
            self._check_inputs(node)
            self.events("stage_started", stage=node.id, key=node.key, status=node.status, reason=node.reason)
            self.plan.recipe.registry.notify("luthier_stage_started", stage=node.id, key=node.key)
            artifact = self._work(node)
        self.events("stage_finished", stage=node.id, key=node.key, seconds=artifact.manifest["seconds"])
        self.plan.recipe.registry.notify(
            "luthier_stage_finished", stage=node.id, key=node.key, manifest=artifact.manifest
        )
        return StageResult(node, "done", artifact=artifact)

    def _check_inputs(self, node: Node) -> None:
        facts = {path: [self._input(name).facts for name in names] for path, names in node.inputs.items()}
        problems = node.config.problems(facts)
        if problems:
            raise StageError("; ".join(problems))

    def _input(self, name: str) -> Artifact:
        found = self.plan.artifact_of(name)
        if found is None:
            raise StoreError(f"the artifact of '{name}' has vanished from the store", hint="run again")
        return found

    def _adopted(self, node: Node, name: str) -> Artifact:
        """An input; a model from outside comes into the store when an adapter in it will sit on it."""
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
                    "the source was changed while the run went on",
                    where=source.place,
                    hint="run again: it is read anew",
                )

    def _work(self, node: Node) -> Artifact:
        work = self.store.work(node.key)
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the scratch folder cannot be made: {error.strerror}",
                where=str(work),
                hint="is the store read-only or the disk full? choose another one with --store",
            ) from error
        inputs = {path: [str(self._adopted(node, name).path) for name in names] for path, names in node.inputs.items()}
        self._check_sources(node)
        job = Job(
            stage=node.id,
            component=node.component.name,
            config=node.config.model_dump(mode="json"),
            inputs=inputs,
            kinds={path: [self._input(name).kind for name in names] for path, names in node.inputs.items()},
            sources={path: [source.place for source in sources] for path, sources in node.sources.items()},
            seed=self.plan.recipe.seed,
            out=str(work / "out"),
            work=str(work),
            run=str(self.folder),
            store=str(self.store.root),
            trackers=[dump_use(use) for use in self.plan.recipe.trackers],
        )
        started = time.perf_counter()
        answer = self._ask(node, job)
        self._check_sources(node)
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
            "config": job.config,
            "payload": node.payload,
            "inputs": {path: [self.plan.key_of(name) for name in names] for path, names in node.inputs.items()},
            "seconds": {**answer["seconds"], "total": time.perf_counter() - started},
            "environment": environment(),
        }
        return commit(self.store, node.key, node.produces, work / "out", about)

    def _ask(self, node: Node, job: Job) -> Event:
        if self.worker is None:
            self.worker = WorkerProcess(self._executor(), self.folder / "worker.log")
        self.worker.send(job)
        asked_to_stop = False
        while True:
            event = self.worker.next_event()
            if self.interrupts and not asked_to_stop:
                self.worker.stop()
                asked_to_stop = True
            if event is None:
                continue
            kind = event.pop("event")
            if kind == "result":
                return event
            if kind == "interrupted":
                raise Interrupted(event["message"], hint="run again to go on from the last checkpoint")
            if kind == "died":
                self.worker = None
                if self.interrupts:
                    raise Interrupted("stopped at once", hint="run again to go on from the last checkpoint")
                raise StageError(event["message"], where=node.id, hint=event["hint"])
            if kind == "failed":
                self._log_failure(event)
                where = event["where"] or node.id
                hint = event["hint"] or (
                    None if event["known"] else f"the log has the traceback: {self.folder}/worker.log"
                )
                raise StageError(event["message"], where=where, hint=hint)
            if kind == "metrics":
                self.plan.recipe.registry.notify(
                    "luthier_metrics_logged", stage=node.id, metrics=event["values"], step=event["step"]
                )
            self.events(kind, **event)

    def _log_failure(self, event: Event) -> None:
        with (self.folder / "worker.log").open("a", encoding="utf-8") as log:
            log.write(event["traceback"])

    def _executor(self) -> Executor:
        use = self.plan.recipe.executor
        return cast("Executor", self.plan.recipe.registry.impl_class(use.component)(use.config))

    def _poll(self) -> None:
        if self.interrupts:
            raise Interrupted("stopped while waiting for another run")

    def _interrupt(self) -> None:
        self.interrupts += 1
        if self.interrupts == 1:
            self.events("log", message="stopping after a checkpoint; once more stops at once")
        elif self.worker is not None:
            self.worker.kill()

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


class _Signals:
    """Routes SIGINT and SIGTERM to a callback while a run goes on, in the main thread only."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        self._callback()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
