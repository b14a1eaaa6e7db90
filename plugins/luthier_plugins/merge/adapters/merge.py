"""The stage ``merge_adapters``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from luthier.api import Artifact, Facts, ModelError, Stage
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import carry_licences
from luthier.artifacts.tensors import tensor_headers
from luthier.merging.api import MergeMethod, MergeMethodConfig
from luthier.merging.files import DTYPES, Files
from luthier.merging.layout import depth_of, layers_of
from luthier.merging.lowrank import LowRank, Unfoldable
from luthier.merging.parts import Noise, merge_tensors
from luthier.merging.pool import by_matrix
from luthier.merging.reader import FROM_TRAINING, NOT_FINITE, content_of, label_of
from luthier_plugins.merge.adapters.config import MergeAdaptersConfig
from luthier_plugins.merge.adapters.files import Factors, low_rank, write_adapter
from torch import Tensor


class MergeAdapters(Stage[MergeAdaptersConfig]):
    """Merges the updates s B A, not the factors: the mean of products is not the product of means."""

    def run(self) -> Facts:
        context = self.context
        artifacts = context.artifacts(self.config.models)
        base = artifacts[0].base
        headers = tensor_headers(base.path)
        contents = [content_of(artifact) for artifact in artifacts]
        method: MergeMethod[Any] = context.build(self.config.method)
        counts = layers_of(list(headers))
        factors: dict[str, Factors] = {}
        kept: list[float] = []
        with ExitStack() as stack:
            files = stack.enter_context(closing(Files(base.path, headers)))
            adapters = [_opened(artifact, files, stack) for artifact in artifacts]
            targets = {name: adapter for adapter, _ in reversed(adapters) for name in adapter.targets}
            names = [name for name in headers if name in targets]

            def work(name: str) -> tuple[Factors, float]:
                # The update of a linear layer has the shape (out, in) also where its weight is stored as (in, out).
                shape = headers[name].shape[:: -1 if targets[name].targets[name].transposed else 1]
                pairs = [_factors(adapter, name, shape, label) for adapter, label in adapters]
                merge = _Merge(self.config, method, name, depth_of(name, counts), Noise(context.seed, contents, name))
                return merge.of(pairs)

            results = stack.enter_context(closing(by_matrix(work, names, lambda name: math.prod(headers[name].shape))))
            for done, (name, (pair, share)) in enumerate(zip(names, results, strict=True)):
                context.progress(done, len(names), "matrices")
                factors[targets[name].module(name)] = pair
                kept.append(share)
        turned = any(adapter.targets[name].transposed for name, adapter in targets.items())
        facts = write_adapter(context.out, factors, base, artifacts[0], transposed=turned)
        for artifact in artifacts[1:]:
            carry_licences(artifact.path, context.out, label_of(artifact))
        # Merged adapters that were trained on bases loaded in the same way are trained further on such a one.
        loads = [artifact.facts.get("load_options", {}) for artifact in artifacts]
        if any(loads) and all(load == loads[0] for load in loads):
            facts["load_options"] = loads[0]
        elif any(loads):
            context.warn(
                "the adapters' bases were loaded in different ways: set `dtype` if the merge is trained further"
            )
        return {**facts, "method": self.config.method.name, "space": self.config.space, "kept": min(kept, default=1.0)}


def _opened(artifact: Artifact, base: Files, stack: ExitStack) -> tuple[LowRank, str]:
    """An adapter, and what to call its file.

    Args:
        artifact: The adapter.
        base: The files of the model it sits on.
        stack: Closes it.

    Raises:
        ModelError: it changes more than linear layers.
    """
    adapter, reason = None, ""
    try:
        adapter = LowRank(artifact.path, base.headers, read_json(artifact.base.path / "config.json"))
        stack.callback(adapter.close)
        for name, stored in list(adapter.replaced.items()):
            # PEFT stores embeddings and heads along with some adapters, whether they were trained or not.
            own = adapter.files.whole(stored).to(DTYPES[base.headers[name].dtype]).float()
            if torch.equal(own, base.whole(name)):
                del adapter.replaced[name]
        reason = adapter.beyond
    except Unfoldable as unfoldable:
        reason = str(unfoldable)
    if adapter is None or reason:
        raise ModelError(
            f"an adapter changes what this stage does not merge: {reason}",
            where=str(artifact.path),
            hint="merge it as a model, in the stage `merge`",
        )
    return adapter, f"{artifact.path / ADAPTER_WEIGHTS} ({label_of(artifact)})"


def _factors(adapter: LowRank, name: str, shape: Sequence[int], label: str) -> Factors:
    """An adapter's factors for a weight; of rank 0 where it has none.

    Raises:
        ModelError: an entry is NaN or infinite.
    """
    if name not in adapter.targets:
        return torch.zeros(shape[0], 0), torch.zeros(0, shape[1])
    b, a, _ = adapter.factors(name)
    if not all(bool(torch.isfinite(factor).all()) for factor in (b, a)):
        raise ModelError(NOT_FINITE, where=f"{label}: {name}", hint=FROM_TRAINING)
    return b, a


class _Merge:
    """Merges one weight's updates."""

    def __init__(
        self, config: MergeAdaptersConfig, method: MergeMethod[Any], name: str, depth: float, noise: Noise
    ) -> None:
        self.config = config
        self.method = method
        self.name = name
        self.depth = depth
        self.noise = noise
        self.weights = list(config.weights or [1.0] * len(config.models))

    def of(self, pairs: Sequence[Factors]) -> tuple[Factors, float]:
        """The merged factors, and the share of the merged update that they keep."""
        if self.config.space == "cat":
            return self._side_by_side(pairs), 1.0
        if self.config.space == "delta":
            merged = self._merged([b @ a for b, a in pairs])
            return low_rank(merged, self._rank(pairs), self.config.energy)
        left, _ = torch.linalg.qr(torch.cat([b for b, _ in pairs], dim=1))
        right, _ = torch.linalg.qr(torch.cat([a for _, a in pairs], dim=0).T)
        core = self._merged([(left.T @ b) @ (a @ right) for b, a in pairs])
        (b, a), kept = low_rank(core, self._rank(pairs), self.config.energy)
        return (left @ b, a @ right.T), kept

    def _rank(self, pairs: Sequence[Factors]) -> int:
        together = sum(a.shape[0] for _, a in pairs)
        return min(self.config.r or together, together)

    def _side_by_side(self, pairs: Sequence[Factors]) -> Factors:
        settings: Any = self.config.method.config
        total = sum(self.weights) if settings.normalize else 1.0
        scaled = [b * (weight / total) for (b, _), weight in zip(pairs, self.weights, strict=True)]
        return torch.cat(scaled, dim=1), torch.cat([a for _, a in pairs], dim=0)

    def _merged(self, updates: Sequence[Tensor]) -> Tensor:
        settings = self.config.method.config
        assert isinstance(settings, MergeMethodConfig), "checked when the config was read"
        # The updates are task vectors already: where a method wants a base, it is zero.
        required = settings.base == "required" or self.method.needs_base
        base = torch.zeros_like(updates[0]) if required else None
        return merge_tensors(
            self.method, updates, self.weights, base, name=self.name, depth=self.depth, noise=self.noise
        )
