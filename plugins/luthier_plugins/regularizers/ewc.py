"""The regularizer ``ewc``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact, CompletionBatch, Regularizer, TokenBatch
from luthier.artifacts.digest import digest_value
from luthier.training.fisher import fisher_of
from luthier.training.moves import LowRank, weights_of
from luthier.training.token_files import Labelling, token_file
from luthier_plugins.regularizers.config import EwcConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Ewc(Regularizer[EwcConfig]):
    """strength / 2 * sum of F (w - w0)^2, F being the diagonal of the Fisher information on data that the model is to
    keep (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3); of a low-rank adapter w is what it adds to the
    weights, B A."""

    def start(self, model: nn.Module, batches: Callable[[], Iterator[TokenBatch]]) -> None:
        self._weights = weights_of(model)
        source = self._source(model)
        dataset = self.context.artifact(self.config.data)
        of = "documents" if dataset.facts["schema"] == "text" else "answers"
        rows = token_file(
            dataset, "train", Labelling(source.path, tuple(source.facts["stop_token_ids"]), None, of), self.context
        )[: self.config.rows]
        file = self.context.cache / "fisher" / f"{self._key(source, dataset)}.safetensors"
        if not file.exists():
            self.context.log(f"estimating the Fisher information from {len(rows)} rows")
            self._keep(fisher_of(model, self._weights, rows, self.context), file)
        device = next(model.parameters()).device
        self._fisher = {name: value.to(device) for name, value in load_file(file).items()}

    def penalty(self, model: nn.Module, batch: TokenBatch, outputs: CompletionBatch) -> Tensor:
        parts = [(value * self._weights[name].delta().square()).sum() for name, value in self._fisher.items()]
        return 0.5 * self.config.strength * torch.stack(parts).sum()

    @staticmethod
    def _source(model: Any) -> Artifact:
        """The model of the stage, by the folder that it was loaded from."""
        inside = model.get_base_model() if hasattr(model, "get_base_model") else model
        return Artifact.load(Path(inside.config.name_or_path))

    def _key(self, source: Artifact, dataset: Artifact) -> str:
        """Identifies the model as it is, the data, and how it was estimated."""
        begun = {name: weight.fingerprint() for name, weight in self._weights.items() if isinstance(weight, LowRank)}
        return digest_value([source.key, dataset.key, self.config.rows, sorted(self._weights), begun])

    @staticmethod
    def _keep(fisher: Mapping[str, Tensor], file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        save_file(dict(fisher), new)
        new.replace(file)
