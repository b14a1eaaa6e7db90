"""Packs documents into blocks and trains on all of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.api import Artifact, Facts, Stage
from luthier.artifacts.datasets import Split
from luthier.training.rows import Blocks, RowSource
from luthier.training.tuning import run_training
from luthier_plugins.pretrain.config import PretrainConfig


class Pretrain(Stage[PretrainConfig]):
    """The stage ``pretrain``."""

    def run(self) -> Facts:
        return run_training(self.config, self.context, self._blocks)

    def _blocks(self, rows: RowSource, datasets: Sequence[Artifact], split: Split) -> Blocks:
        documents = rows.documents(datasets, split)
        return Blocks(
            documents,
            documents.lengths,
            rows.block_length(),
            self.context.seed,
            across=self.config.across_documents,
        )
