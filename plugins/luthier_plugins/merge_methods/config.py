"""The configs of the merge methods."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from luthier.api import DatasetInput, Field
from luthier.merging.api import BaseUse, Divisor, MergeMethodConfig, ModelSetting, Setting, Share, within
from pydantic import model_validator

Fraction = Annotated[Setting, within(0.0, 1.0)]
Amount = Annotated[Setting, within(0.0)]
Positive = Annotated[Setting, within(0.0, above=True)]


class LinearConfig(MergeMethodConfig):
    """Weighted average."""

    normalize: bool = True
    """Divide by the sum of the weights."""

    @property
    def divides(self) -> Divisor:
        return "weights" if self.normalize else "nothing"


class SlerpConfig(MergeMethodConfig):
    """Spherical interpolation."""

    models: ClassVar[tuple[int, int | None]] = (2, 2)
    weighted: ClassVar[bool] = False

    t: Fraction = 0.5
    """How far to go from the first model (0) to the second (1)."""


class NuslerpConfig(MergeMethodConfig):
    """Spherical interpolation by weights, of models or of task vectors."""

    base: ClassVar[BaseUse] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    flatten: bool = True
    """Take the angle between whole parameters; else row by row."""

    @property
    def divides(self) -> Divisor:
        return "weights"


class MultislerpConfig(MergeMethodConfig):
    """Interpolation of any number of models on a sphere, in the tangent space at their mean."""

    base: ClassVar[BaseUse] = "optional"

    normalize: bool = True
    """Divide the weights by their sum."""

    @property
    def divides(self) -> Divisor:
        return "weights" if self.normalize else "nothing"


class KarcherConfig(MergeMethodConfig):
    """The weighted Karcher mean on the sphere."""

    steps: int = Field(default=10, gt=0)
    """Iterations at most."""
    tolerance: Positive = 1e-5
    """Stop when the mean moves by less, in radians."""

    @property
    def divides(self) -> Divisor:
        return "weights"


class TaskVectorConfig(MergeMethodConfig):
    """What methods that add up task vectors share."""

    base: ClassVar[BaseUse] = "required"

    scale: Setting = 1.0
    """What the merged task vector is multiplied with (lambda)."""


class SummedConfig(TaskVectorConfig):
    """What the methods share that add up task vectors, or what is kept of them."""

    elects: ClassVar[bool] = False
    """Whether only entries of the elected sign are added up (TIES)."""

    normalize: bool = False
    """Divide by the sum of the weights."""

    @property
    def divides(self) -> Divisor:
        if not self.normalize:
            return "nothing"
        return "agreeing weights" if self.elects else "weights of changes"


class TaskArithmeticConfig(SummedConfig):
    """Adds up task vectors."""


class TiesConfig(SummedConfig):
    """TIES merging."""

    elects: ClassVar[bool] = True

    density: Share = 0.5
    """The share of each task vector's entries that is kept, the largest by magnitude."""
    normalize: bool = True
    """Divide by the sum of the weights that agree with the elected sign, entry by entry."""


class DareConfig(SummedConfig):
    """DARE: drop entries at random and rescale the others."""

    density: Share = 0.5
    """The probability with which an entry is kept."""
    rescale: bool = True
    """Divide what is kept by the density, so that the expectation stays."""


class DareTiesConfig(DareConfig):
    """DARE with the sign election of TIES."""

    elects: ClassVar[bool] = True

    normalize: bool = False
    """Divide by the sum of the weights that agree with the elected sign, entry by entry."""


class DellaConfig(SummedConfig):
    """DELLA: drop entries at random, the small ones more likely."""

    elects: ClassVar[bool] = True

    density: Share = 0.5
    """The mean probability with which an entry is kept."""
    epsilon: ModelSetting = 0.15
    """How far the probability goes below `density` for a row's smallest entry, and above it for its largest."""
    rescale: bool = True
    """Divide what is kept by its probability, so that the expectation stays."""
    normalize: bool = True
    """Divide by the sum of the weights that agree with the elected sign, entry by entry."""

    @model_validator(mode="after")
    def _probabilities(self) -> DellaConfig:
        density, epsilon = self.density, self.epsilon
        if isinstance(epsilon, float) and epsilon < 0:
            raise ValueError(
                f"`epsilon` is {epsilon:g}: below 0, small entries would be kept more likely than large ones"
            )
        if isinstance(density, float) and isinstance(epsilon, float) and 0 < density < 1:
            low, high = density - epsilon, density + epsilon
            if low <= 0 or high >= 1:
                raise ValueError(
                    f"`density` and `epsilon` make probabilities from {low:g} to {high:g}: "
                    "both have to be between 0 and 1"
                )
        return self


class DellaLinearConfig(DellaConfig):
    """DELLA without sign election."""

    elects: ClassVar[bool] = False

    normalize: bool = False
    """Divide by the sum of the weights."""


class BreadcrumbsConfig(SummedConfig):
    """Model breadcrumbs: drop the largest entries and the smallest."""

    density: Share = 0.9
    """The share of each task vector's entries that is kept."""
    gamma: Share = 0.01
    """The share of largest entries that is dropped."""


class BreadcrumbsTiesConfig(BreadcrumbsConfig):
    """Model breadcrumbs with the sign election of TIES."""

    elects: ClassVar[bool] = True

    normalize: bool = False
    """Divide by the sum of the weights that agree with the elected sign, entry by entry."""


class ModelStockConfig(MergeMethodConfig):
    """The angles between the task vectors decide."""

    base: ClassVar[BaseUse] = "required"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    weighted: ClassVar[bool] = False

    filter_wise: bool = False
    """Take the angles row by row; else of whole parameters."""


class SceConfig(MergeMethodConfig):
    """SCE: select, calculate, erase."""

    base: ClassVar[BaseUse] = "required"
    weighted: ClassVar[bool] = False

    density: Fraction = 1.0
    """The share of entries that is kept, those on which the task vectors differ most."""


class NearswapConfig(MergeMethodConfig):
    """Moves from the base toward one model by a fixed distance at most."""

    base: ClassVar[BaseUse] = "required"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    weighted: ClassVar[bool] = False

    t: Setting = 1e-3
    """The distance, in units of the weights."""


class ArceeFusionConfig(MergeMethodConfig):
    """Takes over the most important changes of one model."""

    base: ClassVar[BaseUse] = "required"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    weighted: ClassVar[bool] = False


class RamConfig(MergeMethodConfig):
    """Reinforced agent merging."""

    base: ClassVar[BaseUse] = "required"
    weighted: ClassVar[bool] = False

    threshold: Amount = 1e-5
    """Changes that are not larger than this do not count."""
    r: Amount = 0.0
    """How much the entries that only one model changed are strengthened (RAM+); 0 is plain RAM."""
    alpha: Amount = 0.2
    """The most that the ratio of shared to unshared entries counts in RAM+."""


class PassthroughConfig(MergeMethodConfig):
    """Takes one model's parameters as they are: for stacks of slices."""

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    weighted: ClassVar[bool] = False

    scale: Setting = 1.0
    """What each parameter is multiplied with."""


class IsoCConfig(TaskVectorConfig):
    """Isotropic merging in the common subspace."""

    @property
    def divides(self) -> Divisor:
        return "weights of changes"


class TsvMConfig(TaskVectorConfig):
    """Merging of task singular vectors."""

    weighted: ClassVar[bool] = False

    share: Annotated[Setting, within(0.0, 1.0, above=True)] | None = None
    """The share of each job's singular vectors that is kept; 1 / models by default."""


class DataMethodConfig(MergeMethodConfig):
    """What methods that use data share."""

    prepares: ClassVar[bool] = True

    data: DatasetInput
    """What the models were tuned for: conversations or texts, of the split `train`."""
    rows: int = Field(default=256, gt=0)
    """How many rows to use."""
    max_length: int = Field(default=512, gt=1)
    """Tokens of a row that are used."""

    @property
    def divides(self) -> Divisor:
        return "weights"


class FisherConfig(DataMethodConfig):
    """Average weighted by the diagonal of the Fisher information."""

    floor: Positive = 1e-8
    """Added to each entry's Fisher information, so that entries that no data touches are averaged."""


class RegmeanConfig(DataMethodConfig):
    """Regression mean."""

    alpha: Fraction = 0.9
    """What the inner products of different inputs are multiplied with."""


class MergekitConfig(MergeMethodConfig):
    """A method of mergekit."""

    base: ClassVar[BaseUse] = "optional"

    name: str = "linear"
    """Its name there, such as ``dare_ties``."""
    module: str | None = None
    """A Python module that registers it with mergekit, for methods of third parties."""
    parameters: dict[str, Any] = {}
    """Its parameters, such as ``{density: 0.5}``; each may be a setting, as for Luthier's own methods."""
    seed: int = Field(default=0, ge=0)
    """The seed of methods with random masks."""

    def of_other_length(self, count: int) -> list[str]:
        given: list[tuple[str, Any]] = [
            (name, value["per_model"])
            for name, value in self.parameters.items()
            if isinstance(value, dict) and "per_model" in value
        ]
        return [name for name, values in given if len(values) != count]
