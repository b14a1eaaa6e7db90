"""Packs documents into blocks and trains on all of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.api import Artifact, Facts, Stage
from luthier.artifacts.datasets import Split
from luthier.training.rows import Blocks, Joined, RowSource
from luthier.training.tuning import run_training
from luthier_plugins.pretrain.config import PretrainConfig


class Pretrain(Stage[PretrainConfig]):
    """The stage ``pretrain``."""

    def run(self) -> Facts:
        return run_training(self.config, self.context, self._blocks)

    def _blocks(self, rows: RowSource, datasets: Sequence[Artifact], split: Split) -> Blocks | Joined:
        if self.config.weights is not None and split == "train":
            # Each has blocks of its own, of which an epoch takes some.
            return Joined([self._packed(rows, [dataset], split) for dataset in datasets])
        return self._packed(rows, datasets, split)

    def _packed(self, rows: RowSource, datasets: Sequence[Artifact], split: Split) -> Blocks:
        documents = rows.documents(datasets, split)
        return Blocks(
            documents,
            documents.lengths,
            rows.block_length(),
            self.context.seed,
            across=self.config.across_documents,
        )
