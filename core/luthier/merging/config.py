"""The config of the stage ``merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError, ValidationInfo, model_validator

from luthier.api import (
    Config,
    Field,
    Input,
    MergeMethodUse,
    ModelInput,
    NotIdentity,
    StageConfig,
    Use,
    full_precision_problems,
)
from luthier.api.artifact import ArtifactKind
from luthier.artifacts.texts import NO_TOKENIZER
from luthier.merging.api import MergeMethodConfig, Setting, cancel
from luthier.merging.mergekit_yaml import as_config

SAME = ("architecture", "tensors")
MERGE_IN_FULL_PRECISION = "merge the full-precision models, and quantize what is made of them"
ModelDtype = Literal["float32", "float16", "bfloat16"]
TokenizerChoice = Annotated[str, Input(("model", "adapter"), words=("base", "union"))]


class SliceSource(Config):
    """Layers of one model."""

    model: ModelInput
    """The model."""
    layers: tuple[int, int]
    """The first of its layers, and the one after the last."""
    weight: Setting = 1.0
    """Its weight."""
    scale: Setting = 1.0
    """What its parameters are multiplied with before they are merged; 0 on ``o_proj`` and ``down_proj`` makes a layer
    that changes nothing."""

    @model_validator(mode="after")
    def _in_order(self) -> SliceSource:
        first, behind = self.layers
        if not 0 <= first < behind:
            raise ValueError(f"layers [{first}, {behind}] is not a range: write [first, one past the last]")
        return self


class Slice(Config):
    """Some layers of the merged model: of one model as they are, or of several merged."""

    sources: list[SliceSource] = Field(min_length=1)
    """Where they come from; all sources have the same number of layers."""
    base: ModelInput | None = None
    """The common ancestor for this slice; by default that of the whole merge."""
    base_layers: tuple[int, int] | None = None
    """The layers of the base that changes are measured from; by default those of the first source's places."""
    settings: dict[str, Any] = {}
    """Parameters of the method for this slice alone, such as ``{t: 0.2}``."""

    @property
    def of_base(self) -> tuple[int, int]:
        """The layers of the base."""
        return self.base_layers or self.sources[0].layers

    @model_validator(mode="after")
    def _equal(self) -> Slice:
        ranges = [*(source.layers for source in self.sources), *([self.base_layers] if self.base_layers else [])]
        counts = [behind - first for first, behind in ranges]
        if len(set(counts)) > 1:
            what = "the sources of a slice, and its base," if self.base_layers else "the sources of a slice"
            raise ValueError(f"{what} have {', '.join(map(str, counts))} layers: the counts must match")
        return self


class TokenRows(Config):
    """Where the rows of one token come from, in every model that has none for it."""

    token: str = Field(min_length=1)
    """The token's text; where the vocabulary lacks it, it is added."""
    model: ModelInput | None = None
    """The model whose rows it gets; by default it is as with all other tokens."""
    like: str | int | None = None
    """Another token of that model, by its text or its id, whose rows are taken."""
    zero: bool = False
    """Give it rows of zeros."""
    force: bool = False
    """Also in models that have their own rows for it."""

    @model_validator(mode="after")
    def _one_source(self) -> TokenRows:
        if self.zero and (self.model is not None or self.like is not None):
            raise ValueError("rows of zeros (`zero`) come from no model: leave `model` and `like` out")
        if self.like is not None and self.model is None:
            raise ValueError("`like` names a token of a `model`: say which")
        if self.force and self.model is None and not self.zero:
            raise ValueError("`force` needs a source: give `model`, or `zero`")
        return self


def _with_file(schema: dict[str, Any]) -> None:
    """Tell editors of the key that stands for a whole file."""
    schema["properties"]["config"] = {"type": "string", "description": "A mergekit file that says all the rest."}


class MergeConfig(StageConfig):
    """Merges models that share an architecture."""

    model_config = ConfigDict(json_schema_extra=_with_file)

    kind_made: ClassVar[ArtifactKind] = "model"
    dated: ClassVar[bool] = True

    models: list[ModelInput] = []
    """The models; an adapter counts as its base with the adapter added. Config, chat template and generation config
    are those of `base` where there is one, else of the first."""
    slices: list[Slice] = []
    """Instead of `models`: the layers of the merged model, slice after slice, each from one model or several."""
    base: ModelInput | None = None
    """The common ancestor, for methods that merge task vectors."""
    weights: list[Setting] | None = None
    """One weight per model, each a number, numbers from the first layer to the last, or a list of
    ``{filter, value}``; 1 by default."""
    method: MergeMethodUse = Field(default="linear")  # type: ignore[assignment]
    """How tensors become one."""
    tokenizer: TokenizerChoice = "base"
    """``base``: that of `base`, else of the first model, which all must share. ``union``: every token of every
    model, with the rows of the embeddings moved to their places. Or a model's, by its stage."""
    tokens: list[TokenRows] = []
    """Tokens whose rows come from where you say. By default, a model that lacks a token gets its rows from the
    base, else the mean of those of the models that have it."""
    pad_to_multiple_of: int | None = Field(default=None, gt=0)
    """Fill the embeddings up to a number of rows that this divides, with the mean of the tokens' rows."""
    chat_template: str | None = None
    """A chat template as Jinja text; a name that mergekit knows, such as ``chatml``; or ``auto``: the one that most
    models have. By default it is that of `base` or the first model, else that of the first model that has one."""
    dtype: ModelDtype | None = None
    """What the merged weights are stored in; by default what the base, else the first model, is stored in."""
    shard_size: int = Field(default=5_000_000_000, gt=0)
    """The largest size of one weights file, in bytes."""
    workers: Annotated[int | None, NotIdentity()] = Field(default=None, gt=0)
    """How many threads merge; by default as many as there are cores."""
    chunk: Annotated[int, NotIdentity()] = Field(default=1 << 21, gt=0)
    """Entries of a large tensor that one thread works on at a time."""
    memory: Annotated[int, NotIdentity()] = Field(default=2 << 30, gt=0)
    """Bytes that methods on whole matrices may hold at once."""

    unused: Annotated[list[str], NotIdentity()] = []
    """Parameters of a mergekit file that its method does not use; a warning names them."""

    @model_validator(mode="before")
    @classmethod
    def _from_mergekit(cls, values: Any, info: ValidationInfo) -> Any:
        """``config: mergekit.yml`` stands for what that file says."""
        if isinstance(values, dict) and "config" in values:
            return as_config(values, (info.context or {}).get("folder"))
        return values

    @model_validator(mode="after")
    def _models_fit(self) -> MergeConfig:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give `models`, or `slices`, and not both")
        if self.slices and self.weights is not None:
            raise ValueError("with `slices`, weights stand beside their sources, as `weight`")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.weights)} weights for {len(self.models)} models")
        method = as_method(self.method)
        counts = [len(part.sources) for part in self.slices] or [len(self.models)]
        problems = self._of_method(method, counts)
        for place, use in self.methods_of_slices().items():
            problems += settings_problems(as_method(use), use.name, [], [counts[place]])
        named = [rows.token for rows in self.tokens]
        problems += [f"`tokens` names {token!r} twice" for token in named if named.count(token) > 1]
        if any(part.base_layers and part.base is None for part in self.slices) and self.base is None:
            problems.append("`base_layers` are layers of the `base`: name it")
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    def methods_of_slices(self) -> dict[int, Use]:
        """The method of each slice that has its own settings, by the slice's place.

        Raises:
            ValueError: the method does not have such a setting, or not with such a value.
        """
        shared = self.method.config.model_dump(mode="json")
        found: dict[int, Use] = {}
        for place, part in enumerate(self.slices):
            if not part.settings:
                continue
            try:
                own = type(self.method.config).model_validate({**shared, **part.settings})
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                why = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"`settings` of slice {place}: {where}: {why}") from error
            found[place] = Use(self.method.component, own)
        return found

    def _of_method(self, method: MergeMethodConfig, counts: list[int]) -> list[str]:
        name = self.method.name
        least, most = method.models
        found = [
            f"{name} takes {_several(least, most)}, not {count}"
            for count in counts
            if count < least or (most is not None and count > most)
        ]
        own = [part.base is not None for part in self.slices]
        if method.base == "required" and self.base is None and not (own and all(own)):
            found.append(f"{name} merges task vectors: name the models' ancestor as `base`")
        if any(own) and (self.tokenizer != "base" or self.tokens):
            found.append(
                "models of other tokenizers are merged in slices with the one `base`: its rows stand for "
                "tokens that a model lacks"
            )
        if method.base == "unused" and (self.base is not None or any(own)):
            found.append(f"{name} does not use a base: leave `base` out, or count it among `models`")
        beside = [source.weight for part in self.slices for source in part.sources]
        if not method.weighted and (self.weights is not None or any(weight != 1.0 for weight in beside)):
            found.append(f"{name} does not use weights: leave them out")
        if method.prepares and self.slices:
            found.append(f"{name} measures what whole models do with data, and cannot merge slices")
        if method.prepares and (self.tokenizer != "base" or self.tokens or self.pad_to_multiple_of):
            found.append(f"{name} reads the models as they are: merge models with the same tokenizer")
        shared = [count for place, count in enumerate(counts) if not (self.slices and self.slices[place].settings)]
        found += settings_problems(method, name, self.weights or [], shared)
        return found

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        merged = [path for path in inputs if not path.startswith("method.")]
        return full_precision_problems(inputs, merged, MERGE_IN_FULL_PRECISION)

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        models = [facts for path, items in inputs.items() if not path.startswith("method.") for facts in items]
        same = [name for name in SAME if not (self.slices and name == "tensors")]
        found = self.early_problems(inputs)
        for name in [*same, *(["tokenizer"] if self.tokenizer == "base" else [])]:
            values = list(dict.fromkeys(str(facts.get(name)) for facts in models))
            if name == "tokenizer" and NO_TOKENIZER in values and len(values) > 1:
                bare = sum(facts.get(name) == NO_TOKENIZER for facts in models)
                found.append(
                    f"the models cannot be merged: {bare} of {len(models)} have no tokenizer; put that of its "
                    "model beside the weights"
                )
                values.remove(NO_TOKENIZER)
            if len(values) > 1:
                short = " and ".join(value[:24] for value in values)
                hint = "; `tokenizer: union` joins them" if name == "tokenizer" else ""
                what = "numbers of tensors differ" if name == "tensors" else f"{name} differs"
                found.append(f"the models cannot be merged, their {what}: {short}{hint}")
        return found


def as_method(use: Use) -> MergeMethodConfig:
    """The config of a merge method.

    Raises:
        ValueError: it is none; methods are plugins.
    """
    if not isinstance(use.config, MergeMethodConfig):
        raise ValueError(f"the config of {use.name} is not a MergeMethodConfig")
    return use.config


def settings_problems(method: MergeMethodConfig, name: str, weights: Sequence[Any], counts: Sequence[int]) -> list[str]:
    """What is wrong with weights and `per_model` settings for so many models."""
    found: list[str] = []
    for count in counts:
        found += [
            f"`{field}` of {name} is given `per_model`, but not for {count} models"
            for field in method.of_other_length(count)
        ]
    plain = [weight for weight in weights if not isinstance(weight, list)]
    if len(plain) == len(weights) and cancel(plain, method.divides):
        found.append(
            f"the weights sum to zero, and {name} divides by their sum"
            if method.divides != "agreeing weights"
            else f"some of the weights cancel each other out, and {name} divides by the sum of those that agree"
        )
    return found


def _several(least: int, most: int | None) -> str:
    if least == most:
        return "one model" if least == 1 else f"{least} models"
    return f"at least {least} models" if most is None else f"{least} to {most} models"
