"""Packs documents into blocks and trains on all of their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

from luthier.api import Artifact, Facts, Stage
from luthier.artifacts.datasets import Split, read_split
from luthier.training.encoding import EncodedRow, RowEncoder, packed_rows
from luthier.training.tuning import run_training
from luthier_plugins.pretrain.config import PretrainConfig


class Pretrain(Stage[PretrainConfig]):
    """The stage ``pretrain``."""

    def run(self) -> Facts:
        return run_training(self.config, self.context, self._blocks)

    def _blocks(self, encoder: RowEncoder, datasets: Sequence[Artifact], split: Split) -> list[EncodedRow]:
        found = chain.from_iterable(encoder.documents(item, split, read_split(item, split)) for item in datasets)
        documents = [row.completions[0].input_ids for row in found]
        random.Random(self.context.seed).shuffle(documents)
        if self.config.across_documents:
            documents = [list(chain.from_iterable(documents))]
        return list(packed_rows(documents, encoder.block_length()))
