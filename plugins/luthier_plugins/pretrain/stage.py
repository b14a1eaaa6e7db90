"""Packs documents into blocks and trains on all of their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api import Facts, Row, Stage
from luthier.modeling.calibration import text_of
from luthier.modeling.text import encode_text
from luthier.training.encoding import EncodedRow, packed_rows
from luthier.training.tuning import run_training
from luthier_plugins.pretrain.config import PretrainConfig


class Pretrain(Stage[PretrainConfig]):
    """The stage ``pretrain``."""

    def run(self) -> Facts:
        return run_training(self.config, self.context, self._blocks)

    def _blocks(self, tokenizer: Any, rows: Sequence[Row]) -> list[EncodedRow]:
        shuffled = list(rows)
        random.Random(self.context.seed).shuffle(shuffled)
        return list(packed_rows(_documents(shuffled, tokenizer), self.config.max_length, tokenizer.eos_token_id))


def _documents(rows: Sequence[Row], tokenizer: Any) -> Iterator[list[int]]:
    for row in rows:
        yield encode_text(tokenizer, text_of(row, tokenizer)).input_ids
