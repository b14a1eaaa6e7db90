"""The recipe: YAML in, every stage's config validated, all problems at once."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

from luthier.api.component import Component
from luthier.api.config import StageConfig, Use
from luthier.api.errors import PluginError, Problem, RecipeError
from luthier.recipe.document import Document, parse, parse_scalar
from luthier.recipe.problems import from_validation, near
from luthier.registry import Registry, default_registry

FORMAT = 1
TOP_KEYS = ("luthier", "name", "seed", "date", "requires", "stages", "trackers", "executor")
STAGE_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class ConfiguredStage:
    """A stage of a recipe with its component and validated config."""

    id: str
    component: Component
    config: StageConfig


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: What its runs are called.
        seed: The seed of every stage.
        date: The day that chat templates are told which ask for it; None where the recipe does not say.
        stages: The stages by id, in the file's order.
        trackers: Where metrics go, beside the run's own events.
        executor: Where workers run.
        folder: What relative paths in the recipe start from.
        document: The file it came from, for messages with line numbers.
    """

    name: str
    seed: int
    date: datetime.date | None
    stages: dict[str, ConfiguredStage]
    trackers: tuple[Use, ...]
    executor: Use
    folder: Path
    document: Document
    registry: Registry

    @classmethod
    def load(cls, path: str | Path, *, overrides: Sequence[str] = (), registry: Registry | None = None) -> Recipe:
        """Read a recipe file.

        Args:
            path: The YAML file.
            overrides: Values that replace the file's, as ``"stages.coder.adapter.r=8"``.
            registry: Where components are looked up; by default the installed plugins.

        Raises:
            RecipeError: everything that is wrong with it.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"the recipe cannot be read: {error.strerror}", where=str(path), hint="check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"the recipe is not UTF-8 text: {error}", where=str(path)) from error
        return cls._from_document(parse(text, str(path)), path.parent, path.stem, overrides, registry)

    @classmethod
    def from_mapping(
        cls, value: Mapping[str, Any], *, folder: str | Path = ".", registry: Registry | None = None
    ) -> Recipe:
        """A recipe from plain Python values, as a YAML file would hold them."""
        odd = next(_odd_values(value), None)
        if odd is not None:
            raise RecipeError(f"{odd[1]!r} is no value that a recipe may have", where=".".join(odd[0]))
        document = Document("<recipe>", dict(value))
        return cls._from_document(document, Path(folder), "recipe", (), registry)

    @classmethod
    def _from_document(
        cls, document: Document, folder: Path, name: str, overrides: Sequence[str], registry: Registry | None
    ) -> Recipe:
        registry = registry or default_registry()
        for override in overrides:
            _override(document.value, override)
        return _Reader(document, folder, name, registry).recipe()


def _odd_values(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What YAML could not hold among plain Python values, and where it is."""
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from _odd_values(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(cast("Sequence[Any]", value)):
            yield from _odd_values(item, (*path, str(place)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, value


def _override(value: Any, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}' has no '='", where="--set", hint="write it as stages.coder.adapter.r=8")
    *parents, last = path.split(".")
    if not isinstance(value, dict):
        raise RecipeError("the recipe is not a mapping: there is nothing to set", where="--set")
    place: Any = cast("Any", value)
    for depth, part in enumerate(parents):
        inner = _item(place, part)
        if isinstance(inner, str) and depth >= 2:
            inner = {"uses": inner}  # `adapter: lora` in the file, and `--set ...adapter.r=8`
            _put(place, part, inner)
        if not isinstance(inner, (dict, list)):
            raise RecipeError(f"'{path}' is not in the recipe: there is no '{part}'", where="--set")
        place = cast("Any", inner)
    _put(place, last, parse_scalar(text))


def _item(place: Any, part: str) -> Any:
    if isinstance(place, list):
        items = cast("list[Any]", place)
        return items[int(part)] if part.isdigit() and int(part) < len(items) else None
    return place.get(part)


def _put(place: Any, part: str, value: Any) -> None:
    if not isinstance(place, list):
        place[part] = value
        return
    items = cast("list[Any]", place)
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"a list of {len(items)} has no item '{part}'", where="--set")
    items[int(part)] = value


class _Reader:
    """Collects every problem of one document before it gives up."""

    def __init__(self, document: Document, folder: Path, name: str, registry: Registry) -> None:
        self.document = document
        self.folder = folder
        self.name = name
        self.registry = registry
        self.problems: list[Problem] = []

    def recipe(self) -> Recipe:
        value = self.document.value
        if not isinstance(value, dict) or "stages" not in value:
            self._fail((), "a recipe is a mapping with the key 'stages'", "see `luthier init`")
            raise RecipeError(self.problems)
        value = cast("dict[str, Any]", value)
        self._check_top(value)
        self._check_requirements(value.get("requires") or [])
        stages = self._stages(value["stages"])
        trackers = self._trackers(value.get("trackers") or [])
        executor = self._use("executor", value.get("executor", "local"), ("executor",))
        seed = value.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            self._fail(("seed",), "the seed has to be a whole number from 0 to 2^32 - 1")
        date = self._date(value.get("date"))
        name = str(value.get("name") or self.name)
        if not self.problems and executor is not None:
            return Recipe(name, seed, date, stages, trackers, executor, self.folder, self.document, self.registry)
        raw = value["stages"]
        left_out = (
            frozenset(str(key) for key in cast("dict[Any, Any]", raw) if key not in stages)
            if isinstance(raw, dict)
            else frozenset[str]()
        )
        partial = None
        if executor is not None and isinstance(seed, int):
            partial = Recipe(name, seed, date, stages, trackers, executor, self.folder, self.document, self.registry)
        raise RecipeError(self.problems, partial=partial, left_out=left_out)

    def _date(self, raw: Any) -> datetime.date | None:
        # YAML makes a date of it, unless it is quoted.
        if raw is None or (isinstance(raw, datetime.date) and not isinstance(raw, datetime.datetime)):
            return raw
        try:
            return datetime.date.fromisoformat(raw if isinstance(raw, str) else "")
        except ValueError:
            self._fail(("date",), f"the date {str(raw)!r} is no day", "write it as 2026-05-31")
            return None

    def _trackers(self, raw: Any) -> tuple[Use, ...]:
        if not isinstance(raw, list):
            self._fail(("trackers",), "expected a list of trackers", "write `trackers: [jsonl]`")
            return ()
        uses = [self._use("tracker", item, ("trackers", index)) for index, item in enumerate(cast("list[Any]", raw))]
        return tuple(use for use in uses if use is not None)

    def _fail(self, path: tuple[str | int, ...], message: str, hint: str | None = None) -> None:
        self.problems.append(self.document.problem(path, message, hint))

    def _check_top(self, value: dict[str, Any]) -> None:
        if value.get("luthier") != FORMAT:
            self._fail(("luthier",), f"this Luthier reads recipe format {FORMAT}", f"begin with `luthier: {FORMAT}`")
        for key in value:
            if key not in TOP_KEYS:
                self._fail((key,), f"unknown key '{key}'", near(key, TOP_KEYS))
        name = value.get("name")
        if name is not None and not (isinstance(name, str) and STAGE_ID.fullmatch(name)):
            self._fail(("name",), "a name has letters, digits, '-' and '_', and begins with a letter")

    def _check_requirements(self, requires: Any) -> None:
        from packaging.requirements import InvalidRequirement, Requirement

        if not isinstance(requires, list):
            self._fail(("requires",), "expected a list of requirements")
            return
        for index, text in enumerate(cast("list[Any]", requires)):
            try:
                requirement = Requirement(str(text))
                version = metadata.version(requirement.name)
            except InvalidRequirement as error:
                self._fail(("requires", index), f"this is not a requirement: {error}")
            except metadata.PackageNotFoundError:
                self._fail(("requires", index), f"{text} is not installed", f"pip install '{text}'")
            else:
                if not requirement.specifier.contains(version, prereleases=True):
                    self._fail(
                        ("requires", index), f"{text} is required, {version} is installed", f"pip install '{text}'"
                    )

    def _stages(self, raw_stages: Any) -> dict[str, ConfiguredStage]:
        if not isinstance(raw_stages, dict) or not raw_stages:
            self._fail(("stages",), "expected a mapping of stage ids to stages, with at least one")
            return {}
        stages: dict[str, ConfiguredStage] = {}
        for stage_id, raw in cast("dict[str, Any]", raw_stages).items():
            if not STAGE_ID.fullmatch(stage_id):
                self._fail(("stages", stage_id), "a stage id has letters, digits, '-', '_', and begins with a letter")
                continue
            stage = self._use("stage", raw, ("stages", stage_id))
            if stage is not None:
                stages[stage_id] = ConfiguredStage(stage_id, stage.component, cast("StageConfig", stage.config))
        configs = {stage_id: stage.config for stage_id, stage in stages.items()}
        return {key: replace(stage, config=stage.config.completed(configs)) for key, stage in stages.items()}

    def _use(self, kind: Any, raw: Any, path: tuple[str | int, ...]) -> Use | None:
        from pydantic import ValidationError

        if isinstance(raw, str):
            raw = {"uses": raw}
        if not isinstance(raw, dict) or not isinstance(cast("Any", raw).get("uses"), str):
            self._fail(
                path,
                f"expected a mapping that names a {kind} under 'uses'",
                f"there are: {', '.join(self.registry.names(kind))}",
            )
            return None
        values = {str(key): item for key, item in cast("dict[Any, Any]", raw).items() if key != "uses"}
        try:
            return self.registry.use(kind, raw, self.folder)
        except PluginError as error:
            self._fail((*path, "uses"), error.message, error.hint)
        except ValidationError as error:
            config_class = self.registry.config_class(self.registry.get(kind, cast("str", raw["uses"])))
            self.problems += from_validation(error, config_class, values, self.document, path, self.registry)
        return None


def dump(value: Mapping[str, Any]) -> str:
    """Plain values as the YAML of a recipe, keys in the given order."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)
