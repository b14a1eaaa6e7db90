"""Methods that add up task vectors, each made sparse in its own way."""

from __future__ import annotations

from typing import Any, ClassVar

from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import (
    BreadcrumbsConfig,
    DareConfig,
    DellaConfig,
    TaskArithmeticConfig,
)
from luthier_plugins.merge_methods.sparsify import (
    by_chance,
    by_magnitude,
    by_rank_and_chance,
    combine,
    magnitude_cuts,
)
from torch import Tensor


class TaskArithmetic(MergeMethod[TaskArithmeticConfig]):
    """base + scale * sum_i w_i (theta_i - base) (Ilharco et al. 2022, arXiv:2212.04089, section 2)."""

    granularity: Granularity = "elementwise"

    def merge(self, part: MergePart) -> Tensor:
        return combine(
            part,
            part.deltas,
            part.weights,
            consensus=False,
            normalize=self.config.normalize,
            scale=part.parameter.value(self.config.scale),
        )


class DareLinear(MergeMethod[DareConfig]):
    """Task arithmetic on task vectors with entries dropped at random (Yu et al. 2023, arXiv:2311.03099)."""

    granularity: Granularity = "elementwise"
    suits_gpu: bool | None = True
    consensus: ClassVar[bool] = False

    def merge(self, part: MergePart) -> Tensor:
        densities = part.parameter.values(self.config.density)
        kept = [
            by_chance(part, model, delta, densities[model], self.config.rescale)
            for model, delta in enumerate(part.deltas)
        ]
        return combine(
            part,
            kept,
            part.weights,
            consensus=self.consensus,
            normalize=self.config.normalize,
            scale=part.parameter.value(self.config.scale),
        )


class DareTies(DareLinear):
    """base + scale * the sum of those entries of the dropped and rescaled task vectors that have the elected sign: DARE
    (Yu et al. 2023, arXiv:2311.03099) with the election of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3.2).
    """

    consensus: ClassVar[bool] = True


class Della(MergeMethod[DellaConfig]):
    """Drops the small entries of a row more likely, then elects signs (Deep et al. 2024, arXiv:2406.11617)."""

    granularity: Granularity = "elementwise"
    suits_gpu: bool | None = True
    consensus: ClassVar[bool] = True

    def merge(self, part: MergePart) -> Tensor:
        place, config = part.parameter, self.config
        densities, epsilons = place.values(config.density), place.values(config.epsilon)
        kept = [
            by_rank_and_chance(part, model, delta, densities[model], epsilons[model], config.rescale)
            for model, delta in enumerate(part.deltas)
        ]
        return combine(
            part,
            kept,
            part.weights,
            consensus=self.consensus,
            normalize=config.normalize,
            scale=place.value(config.scale),
        )


class DellaLinear(Della):
    """base + scale * sum_i w_i m_i (theta_i - base) / p_i, with the masks m_i and probabilities p_i of DELLA
    (Deep et al. 2024, arXiv:2406.11617) and no sign election.
    """

    consensus: ClassVar[bool] = False


class Ties(MergeMethod[Any]):
    """Trim, elect signs, merge (Yadav et al. 2023, arXiv:2306.01708, sections 3.1 to 3.3).

    Each task vector keeps its `density` largest entries; per entry, the sign with the larger weighted mass wins; the
    weighted mean of the entries that have it is added to the base. Equal entries are kept by lowest index; where
    the masses of both signs are equal, nothing is added.
    """

    granularity: Granularity = "statistics"
    suits_gpu: bool | None = True
    consensus: ClassVar[bool] = True

    def gammas(self, scan: Scan) -> list[float]:
        """The share of each task vector's largest entries that is dropped."""
        return [0.0] * scan.parameter.models

    def measure(self, scan: Scan) -> Any:
        densities, gammas = scan.parameter.values(self.config.density), self.gammas(scan)
        if all(density >= 1 for density in densities) and not any(gammas):
            return None
        return magnitude_cuts(scan, densities, gammas)

    def merge(self, part: MergePart) -> Tensor:
        kept = part.deltas
        if part.found is not None:
            kept = [by_magnitude(delta, cuts, part.start) for delta, cuts in zip(kept, part.found, strict=True)]
        return combine(
            part,
            kept,
            part.weights,
            consensus=self.consensus,
            normalize=self.config.normalize,
            scale=part.parameter.value(self.config.scale),
        )


class Breadcrumbs(Ties):
    """base + scale * sum_i w_i m_i (theta_i - base), where m_i leaves out a task vector's largest share gamma of
    entries and all after the next share density (Davari et al. 2023, arXiv:2312.06795, section 3).
    """

    config: BreadcrumbsConfig
    consensus: ClassVar[bool] = False

    def gammas(self, scan: Scan) -> list[float]:
        return scan.parameter.values(self.config.gamma)


class BreadcrumbsTies(Breadcrumbs):
    """base + scale * the sum of the crumbs (Davari et al. 2023, arXiv:2312.06795) that have the elected sign
    (Yadav et al. 2023, arXiv:2306.01708, section 3.2).
    """

    consensus: ClassVar[bool] = True
