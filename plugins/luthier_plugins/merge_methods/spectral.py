"""Methods that work on the singular vectors of whole task matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from luthier.merging.api import Granularity, MergeMethod, MergePart
from luthier_plugins.merge_methods.config import IsoCConfig, TsvMConfig
from torch import Tensor

ROUNDING = 1e-5
"""The share of the largest singular value below which one is rounding in float32."""
EMBEDDINGS = ("embed_", "embeddings", "lm_head", "wte", "wpe")


def _is_map(part: MergePart) -> bool:
    """Whether a parameter maps vectors to vectors; a stack of matrices (experts) is worked on matrix by matrix."""
    shape = part.parameter.shape
    return len(shape) >= 2 and min(shape[-2:]) > 1 and not any(name in part.parameter.name for name in EMBEDDINGS)


def _mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # All of them 0: nothing changes.
    total = sum(weights) or 1.0
    return sum(
        (delta * (weight / total) for delta, weight in zip(deltas, weights, strict=True)), torch.zeros_like(deltas[0])
    )


class IsoC(MergeMethod[IsoCConfig]):
    """base + scale * s U V^T, with U S V^T the sum of the task matrices and s the mean of S (Marczak et al. 2025,
    arXiv:2502.04959, section 4.1); directions in which nothing changed, as with adapters, are left alone. What is no
    matrix, and embeddings, is averaged.
    """

    granularity: Granularity = "matrix"

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "iso_c requires a base in its config"
        scale = part.parameter.value(self.config.scale)
        if not _is_map(part):
            return part.base + scale * _mean(part.deltas, part.weights)
        total = sum(
            (delta * weight for delta, weight in zip(part.deltas, part.weights, strict=True)),
            torch.zeros_like(part.base),
        )
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        there = _there(s)
        mean = (s * there).sum(dim=-1) / there.sum(dim=-1).clamp(min=1)
        return part.base + scale * mean[..., None, None] * ((u * there[..., None, :]) @ vh)


class TsvM(MergeMethod[TsvMConfig]):
    """base + scale * U' S V'^T: each job's first singular vectors side by side, made orthogonal to each other by
    the nearest orthogonal matrices U' and V' (Gargiulo et al. 2025, arXiv:2412.00081, algorithm 1). What is no matrix,
    and embeddings, is averaged.
    """

    granularity: Granularity = "matrix"

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "tsv_m requires a base in its config"
        scale = part.parameter.value(self.config.scale)
        if not _is_map(part):
            return part.base + scale * _mean(part.deltas, part.weights)
        given = self.config.share
        share = 1 / len(part.tensors) if given is None else part.parameter.value(given)
        rank = max(1, int(min(part.parameter.shape[-2:]) * share))
        jobs = [torch.linalg.svd(delta, full_matrices=False) for delta in part.deltas]
        # Directions in which nothing changed are any: they would turn the others.
        there = [_there(s)[..., None, :] for _, s, _ in jobs]
        left = _nearest_orthogonal(
            torch.cat([(u * kept)[..., :, :rank] for (u, _, _), kept in zip(jobs, there, strict=True)], dim=-1)
        )
        right = _nearest_orthogonal(
            torch.cat([(vh.mT * kept)[..., :, :rank] for (_, _, vh), kept in zip(jobs, there, strict=True)], dim=-1)
        )
        sizes = torch.cat(
            [(s * kept[..., 0, :])[..., :rank] for (_, s, _), kept in zip(jobs, there, strict=True)], dim=-1
        )
        return part.base + scale * (left * sizes[..., None, :]) @ right.mT


def _there(sizes: Tensor) -> Tensor:
    """Which singular values are more than rounding: 1 and 0, in the shape of `sizes`."""
    return sizes.gt(ROUNDING * sizes.amax(dim=-1, keepdim=True)).to(sizes.dtype)


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest (orthogonal Procrustes)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
