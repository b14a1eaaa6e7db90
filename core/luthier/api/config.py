"""Config classes of components, and the markers that say what a field refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from luthier.api.artifact import ArtifactKind
from luthier.api.component import Component, Kind
from luthier.api.errors import PluginError


class Config(BaseModel):
    """Base of every component's config: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @property
    def needs_tool(self) -> str | None:
        """The tool with an environment of its own that the component runs, see ``luthier doctor``; None for most."""
        return None


def _parsed(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value


Pattern = Annotated[str, AfterValidator(_parsed)]
"""A regular expression."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage expects to need; unknown parts are None.

    Attributes:
        rows: Rows it will read or write.
        tokens: Tokens it will train on or generate.
        disk: Bytes it will write.
        memory: Bytes it will hold at its peak, beside the libraries themselves.
    """

    rows: int | None = None
    tokens: int | None = None
    disk: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """The verdict on one quality requirement."""

    metric: str
    required: str
    value: float | None
    ok: bool


class NotIdentity:
    """Marks a field that does not change the result, such as a device or a log interval."""

    def __repr__(self) -> str:
        return "NotIdentity()"


class StageConfig(Config):
    """Base of a stage's config."""

    kind_made: ClassVar[ArtifactKind] = "dataset"
    """The kind of artifact the stage makes, unless `produces` says otherwise."""
    seeded: ClassVar[bool] = True
    """Whether the recipe's seed changes the result."""

    after: Annotated[list[str], NotIdentity()] = []
    """Stages that must be done, and their gates hold, before this one starts."""

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        """The kind of artifact made, given the kinds of the inputs by field path."""
        return self.kind_made

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        """The facts of the artifact as far as they can be told before it is made, such as a model's ``parameters`` or
        a dataset's ``rows`` and ``characters``. By default those of the model, or of the data, that goes in.

        Args:
            inputs: Facts by field path: those of finished artifacts, and expected_facts ones.
            sources: Local paths by field path.
        """
        for field in ("model", "models", "data"):
            if inputs.get(field):
                return inputs[field][0]
        return {}

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        """What the stage will need, from facts of its inputs: those of finished artifacts, and expected_facts ones."""
        return Estimate()

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        """What is wrong with these kinds of inputs, by field path; asked before anything runs."""
        return []

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """What is wrong with these inputs' facts, as far as they are known before running."""
        return []

    def gates(self, facts: Mapping[str, Any]) -> list[Gate]:
        """The verdicts on the finished artifact's facts; a failed one ends the run with exit code 3."""
        return []


def other_formats(
    stage: str, inputs: Mapping[str, Sequence[Mapping[str, Any]]], known: Sequence[str], field: str = "data"
) -> list[str]:
    """A problem for each dataset whose format a stage cannot read."""
    formats = [str(facts["format"]) for facts in inputs.get(field, [])]
    wanted = " or ".join(known)
    return [f"{stage} reads the format {wanted}, not {name}" for name in formats if name not in known]


@dataclass(frozen=True, slots=True)
class Input:
    """Marks a field whose value names an artifact: a stage of the recipe, or one from outside.

    Attributes:
        kinds: The kinds of artifact it accepts.
        words: Values that are words of the field's own and name no artifact.
    """

    kinds: tuple[ArtifactKind, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Marks a field that names something outside the store; its content is part of the key.

    Attributes:
        kind: ``"file"`` (one file, or a folder of files) or ``"model"`` (a model folder or ``hf:`` id).
    """

    kind: Literal["file", "model"]


class Components(Protocol):
    """Where components are looked up; the registry is one."""

    def get(self, kind: Kind, name: str) -> Component:
        """The component. Raises PluginError when there is none, or when two claim the name."""
        ...

    def config_class(self, component: Component) -> type[Config]:
        """The component's config class. Raises PluginError when it cannot be imported."""
        ...


@dataclass(frozen=True, slots=True)
class Use:
    """A chosen sub-component and its validated config."""

    component: Component
    config: Config

    @property
    def name(self) -> str:
        return self.component.name


@dataclass(frozen=True, slots=True)
class SubComponent:
    """Marks a field that holds ``{uses: name, ...}`` or a bare name, of the given kind."""

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(dump_use),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-luthier-kind": self.kind}

    def _validate(self, value: Any, info: ValidationInfo) -> Use:
        if isinstance(value, Use):
            return value
        given: Any = {"uses": value} if isinstance(value, str) else value
        raw = cast("dict[str, Any]", given if isinstance(given, dict) else {})
        if not isinstance(raw.get("uses"), str):
            raise PydanticCustomError("uses_missing", "expected a name, or a mapping with the key 'uses'")
        context: Mapping[str, Any] = info.context or {}
        components: Components | None = context.get("components")
        if components is None:
            raise PydanticCustomError("no_components", "a sub-component needs the registry to be validated")
        try:
            component = components.get(self.kind, raw["uses"])
            config_class = components.config_class(component)
        except PluginError as error:
            raise PydanticCustomError("component", "{text}", {"text": str(error)}) from error
        # A nested ValidationError is merged into the outer one, with the outer location in front.
        rest = {key: item for key, item in raw.items() if key != "uses"}
        return Use(component, config_class.model_validate(rest, context=info.context))


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """Marks a list field for which a recipe may write one value alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        listed = handler(schema)
        return {"anyOf": [listed.get("items", {}), listed]}

    @staticmethod
    def _listed(value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value


def dump_use(use: Use) -> dict[str, Any]:
    """The recipe form of a sub-component, defaults filled in."""
    return {"uses": use.name, **use.config.model_dump(mode="json")}


AdapterUse = Annotated[Use, SubComponent("adapter")]
AugmenterUse = Annotated[Use, SubComponent("augmenter")]
ExporterUse = Annotated[Use, SubComponent("exporter")]
FormatUse = Annotated[Use, SubComponent("format")]
MergeUse = Annotated[Use, SubComponent("merge")]
MetricUse = Annotated[Use, SubComponent("metric")]
QuantizerUse = Annotated[Use, SubComponent("quantizer")]
PreferenceLossUse = Annotated[Use, SubComponent("preference_loss")]
RegularizerUse = Annotated[Use, SubComponent("regularizer")]
TrackerUse = Annotated[Use, SubComponent("tracker")]

DatasetInput = Annotated[str, Input(("dataset",))]
DatasetInputs = Annotated[list[DatasetInput], Field(min_length=1), OneOrMany()]
ModelInput = Annotated[str, Input(("model", "adapter"))]
FileSource = Annotated[str, Source("file")]
ModelSource = Annotated[str, Source("model")]


def marker(config_class: type[BaseModel], field: str, kind: type[Any]) -> Any | None:
    """The marker of type `kind` on a field, also when it sits inside a list or a union."""
    info = config_class.model_fields[field]
    for item in info.metadata:
        if isinstance(item, kind):
            return item
    return _marker_in(info.annotation, kind)


def _marker_in(annotation: Any, kind: type[Any]) -> Any | None:
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, kind):
            return item
    for part in get_args(annotation):
        found = _marker_in(part, kind)
        if found is not None:
            return found
    return None


def configs_of(annotation: Any) -> list[type[Config]]:
    """The configs that a field's type is made of."""
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, Config) else []
    return [*own, *(item for part in get_args(annotation) for item in configs_of(part))]


def references(config: BaseModel, kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, list[str]]]:
    """Every marked field of a config and of the configs inside it.

    Yields:
        The field's path (``"method.data"``), its marker, and the values it names (none when unset).
    """
    for name in type(config).model_fields:
        value = getattr(config, name)
        path = f"{prefix}{name}"
        found = marker(type(config), name, kind)
        if found is not None:
            values = cast("list[Any]", value) if isinstance(value, list) else [value]
            words: tuple[str, ...] = getattr(found, "words", ())
            yield path, found, [str(item) for item in values if item is not None and item not in words]
        for child_path, child in _children(path, value):
            yield from references(child, kind, f"{child_path}.")


def configs_in(config: BaseModel) -> Iterator[BaseModel]:
    """A config and the configs inside it."""
    yield config
    for name in type(config).model_fields:
        for _, child in _children(name, getattr(config, name)):
            yield from configs_in(child)


def _children(path: str, value: Any) -> Iterator[tuple[str, BaseModel]]:
    if isinstance(value, Use):
        yield path, value.config
    elif isinstance(value, BaseModel):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("list[Any]", value)):
            yield from _children(f"{path}.{index}", item)
    elif isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            yield from _children(f"{path}.{key}", item)


def identity(config: BaseModel) -> dict[str, Any]:
    """The part of a config that decides the result: no device, no path, no stage id.

    Fields that name inputs or sources are left out: their keys and digests stand for them.
    """
    result: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        names_input = marker(type(config), name, Input)
        is_input = names_input is not None and value not in names_input.words
        if is_input or any(marker(type(config), name, kind) is not None for kind in (NotIdentity, Source)):
            continue
        result[name] = _identity_of(value)
    return result


def _identity_of(value: Any) -> Any:
    if isinstance(value, Use):
        about = value.component
        return {"uses": about.name, "revision": about.revision, "config": identity(value.config)}
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, dict):
        return {str(key): _identity_of(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_identity_of(item) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a key; use plain values in configs")


__all__ = ["Config", "Field", "StageConfig"]
