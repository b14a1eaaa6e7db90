"""Config classes of components, and the markers that say what a field refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic import Field as Field
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from luthier.api.artifact import Artifact, ArtifactKind
from luthier.api.component import Component, Kind
from luthier.api.errors import PluginError
from luthier.api.kinds import kind_of_use


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
        """The tool with its own environment that the component runs, see ``luthier doctor``; None for most."""
        return None


def _parsed(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from error
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
        work: What it does, and with how many parameters: `seconds` are told from the last time that the same was done.
        seconds: How long it will take, beside loading and storing; planning fills it in.
    """

    rows: int | None = None
    tokens: int | None = None
    disk: int | None = None
    memory: int | None = None
    work: tuple[str, int] | None = None
    seconds: float | None = None


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


class Resources(Config):
    """What a stage wants of the machine; none of it changes the result beyond rounding."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs; only slots with at least so many are given the stage. 0 keeps it on the CPU."""
    processes: int | None = Field(default=None, gt=0)
    """Processes (ranks) that compute the stage together; by default one for each GPU that is asked for, else one. Only
    some stages can be computed by several."""


class StageConfig(Config):
    """Base of a stage's config."""

    kind_made: ClassVar[ArtifactKind] = "dataset"
    """The kind of artifact the stage makes, unless `produces` says otherwise."""
    seeded: ClassVar[bool] = True
    """Whether the recipe's seed changes the result."""
    dated: ClassVar[bool] = False
    """Whether the recipe's date does: chat templates that ask for the day are told it."""
    quick: ClassVar[bool] = False
    """Whether the stage takes little time, and may well fail: such stages run before others, so that what is wrong is
    known before hours are spent."""
    several_ranks: ClassVar[bool] = False
    """Whether several processes can compute the stage together: rank 0 alone writes, in `context.out` and in
    `context.scratch`."""

    learns_from: ClassVar[tuple[str, ...]] = ()
    """The fields that name datasets whose split `train` the stage trains on."""
    measures_on: ClassVar[tuple[str, ...]] = ()
    """The fields that name datasets whose split `test` the stage measures on: before training, and before measuring,
    none of it may be in what is trained on."""

    after: Annotated[list[str], NotIdentity()] = []
    """Stages that must be done, and their gates hold, before this one starts."""
    seed: Annotated[int | None, NotIdentity()] = Field(default=None, ge=0, lt=2**32)
    """The seed of this stage; by default the recipe's. Two stages that differ in nothing else make two artifacts."""
    resources: Annotated[Resources, NotIdentity()] = Resources()
    """What the stage wants of the machine."""

    @model_validator(mode="after")
    def _can_have_ranks(self) -> StageConfig:
        if not self.several_ranks and (self.resources.processes or 1) > 1:
            raise ValueError("the stage is computed by one process: leave `resources.processes` out")
        return self

    @property
    def leakage_allowed(self) -> str | None:
        """Why rows may be both trained on and tested on; None where they may not."""
        return None

    @property
    def ranks(self) -> int:
        """How many processes compute the stage."""
        return self.resources.processes or (self.resources.gpus or 1 if self.several_ranks else 1)

    def completed(self, stages: Mapping[str, StageConfig]) -> StageConfig:
        """This config, with what the recipe leaves open and its other stages say; by default as it is.

        Args:
            stages: The configs of the recipe's stages, this one among them.
        """
        return self

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        """The kind of artifact made, given the kinds of the inputs by field path."""
        return self.kind_made

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        """The facts of the artifact as far as they are known before it is made, such as a model's ``parameters`` or
        a dataset's ``rows`` and ``characters``. By default those of the model, or of the data, that goes in.

        Args:
            inputs: Facts by field path: those of finished artifacts, and expected_facts ones.
            sources: Local paths by field path.
        """
        for field in ("model", "models", "data"):
            if inputs.get(field):
                facts = inputs[field][0]
                # What is made of several models may have the template of any of them, or another.
                return {k: v for k, v in facts.items() if k != "chat_template"} if field == "models" else facts
        return {}

    def unfit(self, made: Artifact) -> str | None:
        """Why an artifact of the same key does not do, so that it is made again; None where it does."""
        return None

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        """What the stage will need, from facts of its inputs: those of finished artifacts, and expected_facts ones."""
        return Estimate()

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        """What is wrong with these kinds of inputs, by field path; asked before anything runs."""
        return []

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """What is wrong with these inputs' facts. Asked once all inputs are made: before the run where they are in the
        store, else before the stage starts."""
        return self.early_problems(inputs)

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """What is wrong with inputs that are not made yet, as far as their `expected_facts` say: any fact may lack."""
        return []

    def resolved(self, sources: Mapping[str, Sequence[str]], components: Components) -> StageConfig:
        """This config with every choice made that depends on what its files hold, such as a format that is recognised.

        What is chosen is part of the plan and of the key.

        Args:
            sources: Local paths by field path; hub models that are not here yet are left out.
            components: Where components are looked up.

        Raises:
            LuthierError: the choice cannot be made.
        """
        return self

    def gates(self, facts: Mapping[str, Any]) -> list[Gate]:
        """The verdicts on the finished artifact's facts; a failed one ends the run with exit code 3."""
        return []


def schema_problems(
    stage: str, inputs: Mapping[str, Sequence[Mapping[str, Any]]], known: Sequence[str], field: str = "data"
) -> list[str]:
    """A problem for each dataset whose schema a stage cannot read."""
    schemas = [str(facts["schema"]) for facts in inputs.get(field, []) if "schema" in facts]
    wanted = " or ".join(known)
    return [f"{stage} reads rows of the schema {wanted}, not {name}" for name in schemas if name not in known]


def full_precision_problems(
    inputs: Mapping[str, Sequence[Mapping[str, Any]]], fields: Sequence[str], remedy: str
) -> list[str]:
    """A problem for each quantized model in these fields, for stages that compute with its weights.

    Args:
        inputs: Facts by field path.
        fields: The paths.
        remedy: What to do instead.
    """
    return [
        f"the model is quantized ({facts['quantization']['method']}): {remedy}"
        for field in fields
        for facts in inputs.get(field, [])
        if "quantization" in facts
    ]


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
        kind: ``"file"`` (one file, or a folder of files), ``"data"`` (the same, or a pattern of files) or ``"model"``
            (a model folder or ``hf:`` id).
    """

    kind: Literal["file", "data", "model"]


class Components(Protocol):
    """Where components are looked up; the registry is one."""

    def get(self, kind: Kind, name: str) -> Component:
        """The component. Raises PluginError when there is none, or when two claim the name."""
        ...

    def config_class(self, component: Component) -> type[Config]:
        """The component's config class. Raises PluginError when it cannot be imported."""
        ...

    def names(self, kind: Kind) -> list[str]:
        """The names of all components of a kind."""
        ...

    def use(self, kind: Kind, given: Any, folder: Path | None = None) -> Use:
        """A component chosen as a recipe does: its name, or a mapping with its name under ``uses``.

        Raises:
            PluginError: there is none of this name, or two claim it.
            ValidationError: its config is wrong.
        """
        ...

    def build(self, use: Use, context: Any) -> Any:
        """An instance of a chosen component.

        Raises:
            PluginError: it cannot be imported or made, or lacks what its kind has; names whose component it is.
        """
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
    """Marks a field that holds ``{uses: name, ...}`` or a bare name, of the given kind. Its default, where it has one,
    is written in the same way."""

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
        context: Mapping[str, Any] = info.context or {}
        components: Components | None = context.get("components")
        if components is None:
            raise PydanticCustomError("no_components", "a sub-component needs the registry to be validated")
        try:
            # A nested ValidationError is merged into the outer one, with the outer location in front.
            return components.use(self.kind, value)
        except PluginError as error:
            raise PydanticCustomError("component", "{text}", {"text": str(error)}) from error


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


DatasetInput = Annotated[str, Input(("dataset",))]
DatasetInputs = Annotated[list[DatasetInput], Field(min_length=1), OneOrMany()]
ModelInput = Annotated[str, Input(("model", "adapter"))]
FileSource = Annotated[str, Source("file")]
DataSource = Annotated[str, Source("data")]
DataSources = Annotated[list[DataSource], Field(min_length=1), OneOrMany()]
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


def uses_in(config: BaseModel) -> Iterator[Use]:
    """Every component that a config, or one inside it, chooses."""
    for inner in configs_in(config):
        for name in type(inner).model_fields:
            yield from _uses_in(getattr(inner, name))


def _uses_in(value: Any) -> Iterator[Use]:
    if isinstance(value, Use):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from _uses_in(item)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _uses_in(item)


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


def identity(config: BaseModel, components: Components) -> dict[str, Any]:
    """The part of a config that decides the result, as far as it differs from the defaults: no device, no path.

    Fields that name inputs or sources are left out: their keys and digests stand for them. A chosen component counts as
    the default only while its revision is the first: a raised revision of a default is seen.
    """
    result: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        names_input = marker(type(config), name, Input)
        is_input = names_input is not None and value not in names_input.words
        if is_input or any(marker(type(config), name, kind) is not None for kind in (NotIdentity, Source)):
            continue
        found = _identity_of(value, components)
        if field.is_required() or not _is_default(type(config), name, found, components):
            result[name] = found
    return result


def _is_default(config_class: type[BaseModel], name: str, found: Any, components: Components) -> bool:
    """Whether a field's identity is that of its default."""
    default = config_class.model_fields[name].get_default(call_default_factory=True)
    used = marker(config_class, name, SubComponent)
    if used is not None and default is not None:
        # Defaults are written as in recipes.
        several = isinstance(default, (list, tuple))
        uses = [components.use(used.kind, item) for item in cast("Any", default if several else [default])]
        default = uses if several else uses[0]
    same = found == _identity_of(default, components)
    return same and not _has_raised_revision(found)


def _has_raised_revision(value: Any) -> bool:
    """Whether a component inside an identity has a revision other than the first."""
    if isinstance(value, dict):
        inside = cast("dict[str, Any]", value)
        raised = "uses" in inside and inside.get("revision", 1) != 1
        return raised or any(_has_raised_revision(item) for item in inside.values())
    return isinstance(value, list) and any(_has_raised_revision(item) for item in cast("list[Any]", value))


def _identity_of(value: Any, components: Components) -> Any:
    if isinstance(value, Use):
        about = value.component
        return {"uses": about.name, "revision": about.revision, "config": identity(value.config, components)}
    if isinstance(value, BaseModel):
        return identity(value, components)
    if isinstance(value, dict):
        return {str(key): _identity_of(item, components) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_identity_of(item, components) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise PluginError(
        f"a config holds {type(value).__name__}, which cannot be part of a key", hint="use plain values in configs"
    )


if TYPE_CHECKING:
    # What type checkers see of the names that `__getattr__` makes out of the table of kinds.
    AdapterUse = Use
    AugmenterUse = Use
    ExecutorUse = Use
    ExporterUse = Use
    FormatUse = Use
    GeneratorUse = Use
    MergeMethodUse = Use
    MetricUse = Use
    ObjectiveUse = Use
    OptimizerUse = Use
    QuantizerUse = Use
    RegularizerUse = Use
    RewardUse = Use
    StageUse = Use
    TrackerUse = Use


def __getattr__(name: str) -> Any:
    """`AdapterUse`, `MetricUse`, ...: the type of a field that chooses a component, for every kind that there is."""
    kind = kind_of_use(name)
    if kind is None:
        raise AttributeError(f"module 'luthier.api.config' has no attribute '{name}'")
    return Annotated[Use, SubComponent(kind)]
