"""Builds the plan: graph, order, keys, status and reasons."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from luthier.api.artifact import Artifact, ArtifactKind, is_artifact
from luthier.api.component import Component
from luthier.api.config import Config, Estimate, Input, Source, StageConfig, configs_in, identity, references, uses_in
from luthier.api.errors import LuthierError, PluginError, Problem, RecipeError
from luthier.api.serving import ToolEnvironment
from luthier.artifacts.adapters import is_adapter, named_base
from luthier.artifacts.checkpoints import checkpoints
from luthier.artifacts.digest import digest_value
from luthier.artifacts.pace import expected_seconds
from luthier.artifacts.places import files_at
from luthier.artifacts.store import Store
from luthier.planning.reasons import reason_to_run
from luthier.planning.sources import HubLock, ResolvedSource, files_of, is_external, resolve
from luthier.recipe import Recipe
from luthier.recipe.problems import near
from luthier.serving.environments import is_ready

KEY_FORMAT = 2
Status = Literal["cached", "run", "resume"]


@dataclass(slots=True)
class Node:
    """One stage of a plan.

    Attributes:
        id: The stage's id; one made for an input from outside is called after its path.
        asked: The stage and field that name such an input, for messages; empty for stages of the recipe.
        inputs: Stage ids (or ``artifact:<folder>``) by field path.
        sources: Resolved files and models by field path.
        tests: The datasets that the recipe tests on, by the stage that does, of a stage that trains.
        names: The stage (or artifact from outside) that each value of an input field stands for.
        code: Digests of the source files of the stage's component and of those it uses, by kind and name.
        changed_code: Those of them whose code is not what made the cached artifact, though their revision is the same.
        key: The sha256 that identifies the result; `payload` is what it is made of.
        expected_facts: The facts of the artifact as far as they are known before it is made.
        status: Whether the result is there, or will be made, from a checkpoint or anew.
        reason: Why.
    """

    id: str
    component: Component
    config: StageConfig
    produces: ArtifactKind
    inputs: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    sources: dict[str, list[ResolvedSource]] = field(default_factory=dict[str, list[ResolvedSource]])
    tests: dict[str, str] = field(default_factory=dict[str, str])
    names: dict[str, str] = field(default_factory=dict[str, str])
    code: dict[str, str] = field(default_factory=dict[str, str])
    changed_code: tuple[str, ...] = ()
    key: str = ""
    payload: dict[str, Any] = field(default_factory=dict[str, Any])
    asked: tuple[str, ...] = ()
    status: Status = "run"
    reason: str = ""
    estimate: Estimate = field(default_factory=Estimate)
    expected_facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def places(self) -> dict[str, list[str]]:
        """Local places of files and models by field path."""
        return {path: [source.place for source in sources] for path, sources in self.sources.items()}

    @property
    def source_places(self) -> dict[str, str]:
        """Local places by the values of the config's source fields."""
        found: dict[str, str] = {}
        for path, _, values in references(self.config, Source):
            found |= dict(zip(values, (source.place for source in self.sources.get(path, [])), strict=True))
        return found

    @property
    def needs(self) -> list[str]:
        """The ids of the stages that it is made from, or comes after."""
        return [*dict.fromkeys([item for items in self.inputs.values() for item in items] + self.config.after)]

    @property
    def waits_for(self) -> list[str]:
        """The ids of the stages that must be finished before."""
        return [*dict.fromkeys([*self.needs, *self.tests.values()])]


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe resolved against a store; `nodes` are in the order in which they can run."""

    recipe: Recipe
    store: Store
    nodes: dict[str, Node]
    outside: dict[str, Artifact]

    def key_of(self, name: str) -> str:
        """The key of a stage, or of an artifact from outside."""
        return self.outside[name].key if name in self.outside else self.nodes[name].key

    def artifact_of(self, name: str) -> Artifact | None:
        """The finished artifact of a stage or from outside; None while it is to be made."""
        return self.outside[name] if name in self.outside else self.store.find(self.nodes[name].key)

    def likely_facts(self, node: Node) -> dict[str, list[Mapping[str, Any]]]:
        """The facts of a stage's inputs by field path: of finished artifacts, and what others are expected to have."""

        def facts(name: str) -> Mapping[str, Any]:
            artifact = self.artifact_of(name)
            return self.nodes[name].expected_facts if artifact is None else artifact.facts

        return {path: [facts(name) for name in names] for path, names in node.inputs.items()}

    def input_problems(self, node: Node) -> list[str]:
        """What is wrong with a stage's inputs, as far as it can be known by now."""
        done = all(self.artifact_of(name) is not None for names in node.inputs.values() for name in names)
        facts = self.likely_facts(node)
        return node.config.input_problems(facts) if done else node.config.early_problems(facts)

    def needed_for(self, targets: Iterable[str]) -> set[str]:
        """The stages needed to make `targets`, themselves included."""
        return _upstream(self.nodes, targets)

    def missing_tools(self, targets: Iterable[str] = ()) -> list[ToolEnvironment]:
        """The environments that making `targets`, by default everything, needs and that have not been made."""
        found: dict[str, ToolEnvironment] = {}
        known = self.recipe.registry.tool_environments()
        for name in self.needed_for(targets or self.nodes):
            node = self.nodes[name]
            if self.store.find(node.key) is None:
                for config in configs_in(node.config):
                    tool = config.needs_tool if isinstance(config, Config) else None
                    if tool is not None and tool not in known:
                        raise PluginError(
                            f"the stage '{node.id}' needs the tool '{tool}', whose environment no plugin describes",
                            hint=f"there are: {', '.join(sorted(known))}; see the hook luthier_tool_environments",
                        )
                    if tool is not None and not is_ready(known[tool]):
                        found[tool] = known[tool]
        return [found[tool] for tool in sorted(found)]

    def __str__(self) -> str:
        return "\n".join(f"{node.id:<20} {node.status:<7} {node.reason}" for node in self.nodes.values())


def _upstream(nodes: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    """Stages, and all that must be finished before them."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in nodes and name not in found:
            found.add(name)
            pending += nodes[name].waits_for
    return found


def plan(
    recipe: Recipe | str | Path,
    store: Store | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Resolve a recipe: nothing is run and nothing heavy is loaded.

    What comes from outside is identified by its content: large files are read once, and remembered as long as they stay
    as they are.

    Args:
        recipe: A recipe, or the path of one.
        store: Where artifacts are kept; see `Store.at`.
        overrides: For a path: values that replace the file's, see `Recipe.load`.
        reading: Hears how many bytes are read, of how many.

    Raises:
        RecipeError: wrong configs, unknown stages, wrong kinds of input, cycles, missing files: all of them.
    """
    store = store if isinstance(store, Store) else Store.at(store)
    if isinstance(recipe, Recipe):
        return _Planner(recipe, store, reading).plan()
    try:
        return _Planner(Recipe.load(recipe, overrides=overrides), store, reading).plan()
    except RecipeError as error:
        raise _with_later_problems(error, store) from error


def _with_later_problems(error: RecipeError, store: Store) -> RecipeError:
    """The error of a recipe that was not read, with what is wrong between the stages that were."""
    partial = cast("Recipe | None", error.partial)
    if partial is None:
        return error
    try:
        _Planner(partial, store, lambda done, total: None, error.left_out).plan()
    except RecipeError as later:
        problems = [*error.problems, *(problem for problem in later.problems if problem not in error.problems)]
        return RecipeError(sorted(problems, key=lambda problem: problem.line or 0))
    except LuthierError:
        return error
    return error


class _Planner:
    def __init__(
        self, recipe: Recipe, store: Store, reading: Callable[[int, int], None], left_out: frozenset[str] = frozenset()
    ) -> None:
        self.left_out = left_out
        self.reading = reading
        self.recipe = recipe
        self.store = store
        self.problems: list[Problem] = []
        self.nodes: dict[str, Node] = {}
        self.outside: dict[str, Artifact] = {}
        file = Path(recipe.document.file)
        self.lock = HubLock(file.with_suffix(".lock.yaml") if file.exists() else None)

    def plan(self) -> Plan:
        for stage in self.recipe.stages.values():
            self.nodes[stage.id] = Node(stage.id, stage.component, stage.config, stage.config.kind_made)
        for node in list(self.nodes.values()):
            self._connect(node)
        # All problems are reported at once: stages after a broken input are checked as far as possible.
        self._connect_tests()
        order = self._order()
        for name in order:
            self._check_kinds(self.nodes[name])
        # What is not in order is not read; what is wrong with it is said where it is resolved.
        with suppress(OSError):
            self.store.digest_large(self._source_files(), self.reading)
        for node in self.nodes.values():
            self._resolve_sources(node)
        # Of a recipe with stages that cannot be read, nothing has a key: it is planned for its problems alone.
        if self.problems or self.left_out:
            raise RecipeError(self.problems)
        result = Plan(self.recipe, self.store, {name: self.nodes[name] for name in order}, self.outside)
        last = self.store.last_keys(self.recipe.name)
        for node in result.nodes.values():
            self._identify(result, node, cast("dict[str, Any]", last.get(node.id, {})))
        if self.problems:
            raise RecipeError(self.problems)
        return result

    def _fail(self, node: Node, path: str, message: str, hint: str | None = None) -> None:
        stage, *inside = node.asked or (node.id, *path.split("."))
        parts: list[str | int] = [int(part) if part.isdigit() else part for part in inside if part]
        self.problems.append(self.recipe.document.problem(("stages", stage, *parts), message, hint))

    def _connect(self, node: Node) -> None:
        for path, _, values in references(node.config, Input):
            node.inputs[path] = [self._provider(node, path, value) for value in values]
            for value, name in zip(values, node.inputs[path], strict=True):
                if node.names.setdefault(value, name) != name:
                    self._fail(node, path, f"'{value}' is used in two ways: as {node.names[value]} and as {name}")
        for value in node.config.after:
            if value not in self.recipe.stages and value not in self.left_out:
                self._fail(node, "after", f"there is no stage '{value}'", near(value, self.recipe.stages))

    def _connect_tests(self) -> None:
        """Have each stage that trains wait for what the recipe tests on, so that it can be told whether it leaks; but
        for what is made with its own result."""
        tests = {
            node.id: name
            for node in self.nodes.values()
            for field in node.config.measures_on
            for name in node.inputs.get(field, [])
            if name in self.nodes or name in self.outside
        }
        for node in self.nodes.values():
            if node.config.learns_from:
                # What other stages wait for by now counts: two that wait for each other would be a cycle.
                node.tests = {
                    stage: name for stage, name in tests.items() if node.id not in _upstream(self.nodes, [name])
                }

    def _provider(self, node: Node, path: str, value: str) -> str:
        if value in self.recipe.stages:
            return value
        if not is_external(value):
            if value not in self.left_out:
                self._fail(node, path, f"there is no stage '{value}'", near(value, self.recipe.stages))
            return value
        folder = (self.recipe.folder / value).absolute()
        if not is_artifact(folder):
            return self._imported(node, path, value)
        try:
            self.outside[value] = self.store.verified(Artifact.load(folder))
        except LuthierError as error:
            self._fail(node, path, error.message, error.hint)
        return value

    def _imported(self, node: Node, path: str, value: str) -> str:
        """A stage for something from outside that is no artifact yet: a data file, a model folder."""
        accepted = next(marker.kinds for name, marker, _ in references(node.config, Input) if name == path)
        try:
            uses, settings = _import_of(value, self.recipe.folder, accepted)
        except LuthierError as error:
            self._fail(node, path, error.message, error.hint)
            return value
        name = f"{uses}({value})"
        if name not in self.nodes:
            use = self.recipe.registry.use("stage", {"uses": uses, **settings})
            config = cast("StageConfig", use.config)
            self.nodes[name] = Node(
                name,
                use.component,
                config,
                config.kind_made,
                asked=node.asked or (node.id, *path.split(".")),
            )
            self._connect(self.nodes[name])
        return name

    def _order(self) -> list[str]:
        """A topological order: quick stages first, else the file's order where inputs leave the choice."""
        position = {name: index for index, name in enumerate(self.nodes)}
        waiting = {name: {need for need in node.waits_for if need in self.nodes} for name, node in self.nodes.items()}
        names = list(self.nodes)

        def rank(name: str) -> tuple[bool, int]:
            return not self.nodes[name].config.quick, position[name]

        ready = [rank(name) for name, needs in waiting.items() if not needs]
        heapq.heapify(ready)
        order: list[str] = []
        while ready:
            done = names[heapq.heappop(ready)[1]]
            order.append(done)
            for name, needs in waiting.items():
                if done in needs:
                    needs.remove(done)
                    if not needs:
                        heapq.heappush(ready, rank(name))
        stuck = [name for name in names if name not in order]
        if stuck:
            node = self.nodes[stuck[0]]
            self._fail(
                node,
                "",
                f"stages wait for each other in a cycle: {' -> '.join(_cycle(waiting, stuck[0]))}",
                "break the cycle: a stage cannot use its own result",
            )
        return order

    def _check_kinds(self, node: Node) -> None:
        kinds: dict[str, list[ArtifactKind]] = {}
        for path, marker, _ in references(node.config, Input):
            kinds[path] = []
            # An unknown input has been reported already; the others are checked without it.
            for name in (name for name in node.inputs[path] if name in self.nodes or name in self.outside):
                kind = self.outside[name].kind if name in self.outside else self.nodes[name].produces
                kinds[path].append(kind)
                if kind not in marker.kinds:
                    wanted = " or ".join(map(_a, marker.kinds))
                    self._fail(node, path, f"'{name}' makes {_a(kind)}, but here {wanted} is needed")
        if not self._blind(node):
            for message in node.config.kind_problems(kinds):
                self._fail(node, "", message)
        node.produces = node.config.produces(kinds)

    def _blind(self, node: Node) -> bool:
        """Whether one of a stage's inputs is not known: what would be said of it might not be so."""
        return any(
            name not in self.nodes and name not in self.outside for items in node.inputs.values() for name in items
        )

    def _source_files(self) -> Iterator[Path]:
        """All files that stages take from outside."""
        for node in self.nodes.values():
            for _, marker, values in references(node.config, Source):
                for value in values:
                    with suppress(LuthierError):
                        yield from files_of(value, marker.kind, self.recipe.folder)

    def _resolve_sources(self, node: Node) -> None:
        for path, marker, values in references(node.config, Source):
            node.sources[path] = []
            for value in values:
                try:
                    node.sources[path].append(resolve(value, marker.kind, self.recipe.folder, self.store, self.lock))
                except LuthierError as error:
                    self._fail(node, path, error.message, error.hint)
                    return
        local = {path: [place for place in places if files_at(Path(place))] for path, places in node.places.items()}
        try:
            node.config = node.config.resolved(local, self.recipe.registry)
        except LuthierError as error:
            self._fail(node, "", str(error))

    def _identify(self, result: Plan, node: Node, last: Mapping[str, Any]) -> None:
        inputs = {path: [result.key_of(name) for name in names] for path, names in node.inputs.items()}
        node.payload = {
            "format": KEY_FORMAT,
            "kind": node.component.kind,
            "name": node.component.name,
            "revision": node.component.revision,
            "config": identity(node.config, self.recipe.registry),
            # Fields that name nothing are left out: a new optional one keeps every key.
            "inputs": {path: keys for path, keys in inputs.items() if keys},
            "sources": {path: [item.digest for item in items] for path, items in node.sources.items() if items},
            "seed": self.seed_of(node),
        }
        if self.recipe.date is not None and node.config.dated:
            node.payload["date"] = self.recipe.date.isoformat()
        node.key = digest_value(node.payload)
        node.code = self._code_of(node)
        cached = self.store.find(node.key)
        unfit = None if cached is None else node.config.unfit(cached)
        if cached is not None and unfit is None:
            node.status, node.reason = "cached", "the result is in the store"
            node.changed_code = _changed_code(cached, node.code)
            if node.changed_code:
                node.reason += f"; the code of {', '.join(node.changed_code)} changed since, the revision did not"
            return
        likely = result.likely_facts(node)
        node.expected_facts = node.config.expected_facts(likely, node.places)
        node.estimate = self._timed(node.config.estimate(likely))
        for message in result.input_problems(node):
            self._fail(node, "", message)
        broken = self.store.broken(node.key)
        whole, _ = checkpoints(self.store.work(node.key))
        node.status = "resume" if whole else "run"
        node.reason = (
            f"the result in the store is damaged: {broken}"
            if broken
            else unfit
            or reason_to_run(
                node.payload,
                last,
                inputs,
                {name: result.key_of(name) for name in node.needs if name in result.nodes or name in result.outside},
            )
        )

    def _timed(self, estimate: Estimate) -> Estimate:
        if estimate.work is None or estimate.tokens is None:
            return estimate
        return replace(estimate, seconds=expected_seconds(self.store.cache, *estimate.work, estimate.tokens))

    def seed_of(self, node: Node) -> int | None:
        """The seed that is part of the key: the stage's own, else the recipe's, where the stage draws numbers."""
        return node.config.seed if node.config.seed is not None or not node.config.seeded else self.recipe.seed

    def _code_of(self, node: Node) -> dict[str, str]:
        components = [node.component, *(use.component for use in uses_in(node.config))]
        found: dict[str, str] = {}
        for component in components:
            path = self.recipe.registry.source_of(component)
            if path is not None:
                version = self.recipe.registry.provider(component)
                found[f"{component.kind} {component.name}"] = f"{self.store.digest_source(path)} {version}"
        return found


def _changed_code(cached: Artifact, now: Mapping[str, str]) -> tuple[str, ...]:
    """The components whose source file differs from when an artifact was made, in the same version."""
    before: Mapping[str, str] = cached.manifest.get("code", {})
    return tuple(
        name
        for name, current in now.items()
        if name in before and before[name] != current and before[name].partition(" ")[2] == current.partition(" ")[2]
    )


def _a(kind: ArtifactKind) -> str:
    return f"an {kind}" if kind[0] in "ae" else f"a {kind}"


def _import_of(value: str, folder: Path, accepted: Sequence[ArtifactKind]) -> tuple[str, dict[str, str]]:
    """The stage that takes something from outside, and its settings.

    An adapter's folder names the model it sits on; ``<model>+<adapter>``, as mergekit writes it, says so itself.

    Raises:
        ModelError: an adapter's model is not known or not here.
    """
    if "dataset" in accepted:
        return "data", {"source": value}
    place = folder / Path(value).expanduser()
    if "+" in value and not place.exists():
        model, _, source = value.rpartition("+")
        return "adapter", {"source": source, "model": model}
    if is_adapter(place):
        return "adapter", {"source": value, "model": named_base(place, folder)}
    return "base", {"source": value}


def _cycle(waiting: Mapping[str, set[str]], start: str) -> list[str]:
    path = [start]
    while True:
        following = min(need for need in waiting[path[-1]] if waiting[need])
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)
