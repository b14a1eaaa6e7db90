"""Packs documents into blocks and trains on all of their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from luthier.api import Facts, StageContext
from luthier.artifacts.datasets import read_split, require_split
from luthier.modeling.loading import load_model, load_tokenizer, save_model
from luthier.modeling.text import Encoded, encode_text, packed, render
from luthier.training.trainer import train_tokens
from luthier_plugins.pretrain.config import PretrainConfig


class Pretrain:
    """The stage ``pretrain``."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        source = context.input("model")
        tokenizer = load_tokenizer(source)
        datasets = context.inputs("data")
        train = self._blocks([row for item in datasets for row in require_split(item, "train")], tokenizer, context)
        held_out = [row for item in datasets for row in read_split(item, "validation")]
        validation = self._blocks(held_out, tokenizer, context)
        model = load_model(source)
        facts = train_tokens(model, tokenizer, train, validation, self.config, context)
        tokens = sum(len(block.input_ids) for block in train)
        return {**save_model(model, source, context.out), "training": {**facts, "blocks": len(train), "tokens": tokens}}

    def _blocks(self, rows: list[dict[str, Any]], tokenizer: Any, context: StageContext) -> list[Encoded]:
        random.Random(context.seed).shuffle(rows)
        return list(packed(self._documents(rows, tokenizer), self.config.max_length, tokenizer.eos_token_id))

    @staticmethod
    def _documents(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[list[int]]:
        for row in rows:
            text = row["text"] if "text" in row else render(tokenizer, row["messages"])
            yield encode_text(tokenizer, text).input_ids
