"""What merge methods see: a parameter, the parts it comes in, and settings that change from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import AfterValidator, Field

from luthier.api.artifact import Artifact
from luthier.api.component import C, Implementation
from luthier.api.config import Config

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["elementwise", "statistics", "matrix"]
BaseUse = Literal["required", "optional", "unused"]
Divisor = Literal["nothing", "weights", "weights of changes", "agreeing weights"]
"""What a method divides by: the sum of all weights; that of the weights of changes to a base, where all may be 0 and
nothing changes; or, entry by entry, the sum of the weights of those changes that agree."""
NO_SUM = 1e-6
"""The share of the weights' sizes up to which their sum counts as zero: in float32 it could be rounding."""
MOST_MODELS = 12
"""Models up to which every choice of weights is tried."""


def cancel(weights: Sequence[float], divisor: Divisor) -> bool:
    """Whether weights sum to zero where a method divides by their sum."""
    given = [weight for weight in weights if weight]
    if divisor == "nothing" or not weights:
        return False
    if not given:
        return divisor == "weights"
    chosen = [tuple(given)]
    if divisor == "agreeing weights":
        # Weights of one sign cannot cancel; a model of weight 0 takes no part.
        few = min(given) < 0 < max(given) and len(given) <= MOST_MODELS
        chosen = [some for size in range(2, len(given) + 1) for some in combinations(given, size)] if few else []
    return any(abs(sum(some)) <= NO_SUM * sum(map(abs, some)) for some in chosen)


class MergeMethodConfig(Config):
    """Base of a merge method's config: what it asks of the models, so that a plan can refuse others."""

    base: ClassVar[BaseUse] = "unused"
    """Whether the method merges task vectors, the differences to a base model."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models it takes, not counting the base; None means no limit."""
    weighted: ClassVar[bool] = True
    """Whether it uses the models' weights."""
    prepares: ClassVar[bool] = False
    """Whether it learns something of each model first, see `MergeMethod.prepare`."""

    @property
    def divides(self) -> Divisor:
        """Which sums of weights it divides by: they must not be zero then."""
        return "nothing"

    def of_other_length(self, count: int) -> list[str]:
        """The settings that are given `per_model`, but not for so many models."""
        return [name for name in type(self).model_fields if _length_of(getattr(self, name)) not in (None, count)]


def _length_of(value: Any) -> int | None:
    """For how many models a setting is given, where it is given model by model."""
    return len(value.per_model) if isinstance(value, PerModel) else None


class Filtered(Config):
    """A value for the parameters whose name contains `filter`."""

    filter: str | None = None
    """Part of a parameter's name, such as ``mlp``; leave it out for all the others."""
    value: float | Annotated[list[float], Field(min_length=1)]
    """A number, or numbers from the first layer to the last."""


class PerModel(Config):
    """One setting for each model, in the order of `models`."""

    per_model: list[float | list[float] | list[Filtered]] = Field(min_length=1)
    """A setting a model."""


PlainSetting = float | list[float] | list[Filtered]


def leaves(setting: PlainSetting | PerModel) -> Iterator[float]:
    """Every number of a setting."""
    if isinstance(setting, PerModel):
        for inner in setting.per_model:
            yield from leaves(inner)
    elif isinstance(setting, list):
        for item in setting:
            yield from leaves(item.value if isinstance(item, Filtered) else item)
    else:
        yield setting


def _complete(setting: PlainSetting | PerModel) -> PlainSetting | PerModel:
    """Refuse a setting that leaves parameters without a value."""
    for plain in setting.per_model if isinstance(setting, PerModel) else [setting]:
        if not isinstance(plain, list):
            continue
        if not plain:
            raise ValueError("an empty list has no meaning: give a number, numbers by layer, or filters")
        last = plain[-1]
        if isinstance(last, Filtered) and last.filter not in (None, "*"):
            raise ValueError("the last entry of a list of filters needs no filter: it is for all other parameters")
    return setting


def within(low: float, high: float = math.inf, *, above: bool = False) -> AfterValidator:
    """Refuse settings with a number outside [low, high], or of (low, high] where it has to be `above` the low."""

    def check(setting: PlainSetting | PerModel) -> PlainSetting | PerModel:
        for value in leaves(setting):
            if above and value <= low:
                raise ValueError(f"{value:g} is not above {low:g}")
            if not low <= value <= high:
                limits = f"less than {low:g}" if high == math.inf else f"not between {low:g} and {high:g}"
                raise ValueError(f"{value:g} is {limits}")
        return setting

    return AfterValidator(check)


Setting = Annotated[PlainSetting, AfterValidator(_complete)]
"""A number; numbers from the first layer to the last, between which is interpolated; or a list of `Filtered`."""
ModelSetting = Annotated[PlainSetting | PerModel, AfterValidator(_complete)]
"""A `Setting` for all models, or `PerModel`."""
Share = Annotated[ModelSetting, within(0.0, 1.0)]
"""A `ModelSetting` between 0 and 1."""


@dataclass(frozen=True, slots=True)
class MergedParameter:
    """Which parameter is merged.

    Attributes:
        name: Its name in the merged model.
        shape: Its whole shape.
        depth: 0 in the first layer, 1 in the last, 0 outside of layers.
        models: How many models are merged, the base not among them.
        origins: What the parameter is called in each model, where layers were put elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    depth: float = 0.0
    models: int = 1
    origins: tuple[str, ...] = ()

    def value(self, setting: PlainSetting | PerModel, model: int | None = None) -> float:
        """What a setting says for this parameter; of one `model`, whose own name for it the filters match."""
        if isinstance(setting, PerModel):
            setting = setting.per_model[model or 0]
        if not isinstance(setting, list):
            return setting
        if isinstance(setting[0], Filtered):
            name = self.name if model is None or not self.origins else self.origins[model]
            chosen = next(item for item in setting if isinstance(item, Filtered) and _passes(item.filter, name))
            return self.value(chosen.value)
        numbers = [item for item in setting if not isinstance(item, Filtered)]
        scaled = self.depth * (len(numbers) - 1)
        lower = int(scaled)
        upper = min(lower + 1, len(numbers) - 1)
        return (1 - (scaled - lower)) * numbers[lower] + (scaled - lower) * numbers[upper]

    def values(self, setting: PlainSetting | PerModel) -> list[float]:
        """What a setting says for this parameter, model by model."""
        return [self.value(setting, model) for model in range(self.models)]


def _passes(pattern: str | None, name: str) -> bool:
    return pattern in (None, "*") or str(pattern) in name


@dataclass(frozen=True, slots=True)
class MergePart:
    """A part of one parameter, of every model.

    Parts are whole rows: a matrix comes as (rows, columns), a vector as one row, more dimensions as
    the rows of all their matrices. A method of the granularity ``matrix`` gets the whole parameter in its own shape.

    Attributes:
        parameter: Which parameter.
        start: The place of the first entry in the flattened parameter.
        tensors: The part in each model, float32, all of one shape. They must not be changed.
        weights: The models' weights for this parameter.
        base: The part in the base model, float32; None without one.
        found: What the method's `measure` returned for this parameter.
        extras: What the method's `prepare` made for this parameter, model by model; empty without.
        draw: Random numbers, see `uniform`.
    """

    parameter: MergedParameter
    start: int
    tensors: Sequence[Tensor]
    weights: Sequence[float]
    base: Tensor | None = None
    found: Any = None
    extras: Sequence[Tensor] = ()
    draw: Callable[[int, int, int], Tensor] | None = field(default=None, repr=False)

    @property
    def deltas(self) -> list[Tensor]:
        """The task vectors: each model minus the base."""
        assert self.base is not None, "a method that merges task vectors requires a base in its config"
        return [tensor - self.base for tensor in self.tensors]

    def uniform(self, model: int) -> Tensor:
        """Random numbers in [0, 1), shaped like the part.

        They depend on the recipe's seed, the model's content, the parameter and the place in it: not on the order in
        which parts are worked on, nor on where the model stands among the others.
        """
        assert self.draw is not None, "the engine gives every part its random numbers"
        first = self.tensors[model]
        return self.draw(model, self.start, first.numel()).view(first.shape).to(first.device)


class Scan(Protocol):
    """A walk over all parts of one parameter."""

    @property
    def parameter(self) -> MergedParameter:
        """Which parameter."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """The models' weights for it."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether the parts are in a GPU's memory, where reading them again takes almost no time."""
        ...

    def __call__(self, function: Callable[[MergePart], Tensor]) -> Tensor:
        """The sum of what `function` returns for each part, added up in the order of the parts."""
        ...

    def each(self, function: Callable[[MergePart], Tensor], every: int = 1) -> list[Tensor]:
        """What `function` returns for each part, or for every so many-th of them, in the order of the parts."""
        ...


class MergeMethod(Implementation[C]):
    """Kind ``merge_method``: how tensors of several models become one."""

    granularity: Granularity
    """What is merged at a time: parts of rows (``elementwise``), parts after a walk over the whole parameter
    (``statistics``, see `measure`), or whole parameters in their own shape (``matrix``)."""

    suits_gpu: bool | None = None
    """Whether tensors may be on a GPU; parts of parameters are larger there than elsewhere. None: whole matrices may,
    parts may not."""
    needs_base: bool = False
    """Whether it needs a base though its config class does not say so, because a setting decides it."""

    def merge(self, part: MergePart) -> Tensor:
        """The merged part: float32, of the shape of the part's tensors."""
        raise NotImplementedError

    def measure(self, scan: Scan) -> Any:
        """What the parts need to know of the whole parameter: every part's `found`; for the granularity ``statistics``
        only."""
        return None

    def prepare(self, models: Sequence[Artifact]) -> Sequence[Mapping[str, Path]]:
        """What it learns of each model before the first parameter is merged: safetensors files by parameter, with the
        extra tensor under the parameter's name. By default nothing; a config that `prepares` says so."""
        return []
