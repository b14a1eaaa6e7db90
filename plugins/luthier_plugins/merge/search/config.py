"""The config of the stage ``search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from luthier.api import (
    DatasetInput,
    Field,
    MergeMethodUse,
    MetricUse,
    ModelInput,
    StageConfig,
    Use,
    full_precision_problems,
    schema_problems,
)
from luthier.api.artifact import ArtifactKind
from luthier.merging.api import MergeMethodConfig
from luthier.merging.config import MERGE_IN_FULL_PRECISION, MergeConfig, ModelDtype
from pydantic import AfterValidator, model_validator

NEARLY_ZERO = 1e-8
"""Where the lower ends of ranges are looked at: weights that are all zero make no merge."""


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] >= value[1]:
        raise ValueError(f"[{value[0]:g}, {value[1]:g}] is not a range: the smaller number comes first")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_range)]


class SearchConfig(StageConfig):
    """Finds the weights, and parameters of the method, with which a merge is best on the split `validation`."""

    kind_made: ClassVar[ArtifactKind] = "model"
    dated: ClassVar[bool] = True

    models: list[ModelInput] = Field(min_length=2)
    """The models."""
    base: ModelInput | None = None
    """The common ancestor, for methods that merge task vectors."""
    method: MergeMethodUse = Field(default="linear")  # type: ignore[assignment]
    """The method; what is not searched for stays as it is given here."""
    weights: Range | None = (0.0, 1.0)
    """The range of every model's weight; leave it empty (`weights: null`) to keep them equal."""
    over: dict[str, Range] = {}
    """Ranges of the method's parameters, such as ``{density: [0.1, 1.0]}``."""
    data: DatasetInput
    """Conversations with the split `validation`; `test` is not used."""
    metric: MetricUse = Field(default="perplexity")  # type: ignore[assignment]
    """What is to be best: highest or lowest, as the metric says."""
    trials: int = Field(default=60, gt=0)
    """How many merges to try."""
    population: int | None = Field(default=None, gt=1)
    """How many trials CMA-ES draws before it learns from them; by default 4 + 3 ln(parameters)."""
    max_new_tokens: int = Field(default=128, gt=0)
    """The maximum number of tokens in an answer."""
    dtype: ModelDtype | None = None
    """What the merged weights are stored in; by default what the base, else the first model, is stored in."""

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        method = self.method.config
        if isinstance(method, MergeMethodConfig) and not method.weighted and self.weights is not None:
            if self.model_fields_set & {"weights"}:
                raise ValueError(f"{self.method.name} does not use weights: set `weights: null`")
            object.__setattr__(self, "weights", None)
        odd = [name for name in self.over if name not in type(method).model_fields]
        if odd:
            known = ", ".join(type(method).model_fields)
            raise ValueError(f"{self.method.name} has no parameter '{odd[0]}'; it has: {known}")
        if self.weights is None and not self.over:
            raise ValueError("there is nothing to search for: give a range of `weights`, or parameters in `over`")
        whole = [name for name in self.over if type(method).model_fields[name].annotation in (int, bool)]
        if whole:
            raise ValueError(f"'{whole[0]}' is not a number that can be searched step by step")
        if self.weights is not None and self.weights[0] < 0:
            raise ValueError("the weights of a search begin at 0: their sum must not become zero")
        # The ends of every range, and a point inside, have to make a config.
        for share in (0.0, 1.0, 0.37):
            self.merge(self.values_at([low + max(share, NEARLY_ZERO) * (high - low) for low, high in self.bounds]))
        return self

    @property
    def names(self) -> list[str]:
        """What is searched for."""
        weights = [f"weight {place}" for place in range(len(self.models))] if self.weights is not None else []
        return [*weights, *sorted(self.over)]

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The range of each."""
        weights = [self.weights] * len(self.models) if self.weights is not None else []
        return [*weights, *(self.over[name] for name in sorted(self.over))]

    def values_at(self, point: Sequence[float]) -> dict[str, float]:
        """The values by name."""
        return dict(zip(self.names, point, strict=True))

    def merge(self, values: Mapping[str, float]) -> MergeConfig:
        """The config of the merge with these values."""
        dumped = self.method.config.model_dump(mode="json")
        settings = type(self.method.config).model_validate({**dumped, **{name: values[name] for name in self.over}})
        weights: list[Any] | None = None
        if self.weights is not None:
            weights = [values[f"weight {place}"] for place in range(len(self.models))]
        return MergeConfig(
            models=self.models,
            base=self.base,
            weights=weights,
            method=Use(self.method.component, settings),
            dtype=self.dtype,
        )

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return [
            *schema_problems("search", inputs, ("messages",)),
            *full_precision_problems(inputs, ("models", "base"), MERGE_IN_FULL_PRECISION),
        ]

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        found = self.early_problems(inputs)
        if any(not facts["rows"].get("validation") for facts in inputs.get("data", [])):
            found.append("the data has no split 'validation': give its stage `split: {validation: 0.1}`")
        return found
