"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.api import Adapter, Artifact, DataError, Facts, Row, StageContext
from luthier.artifacts.datasets import read_split, require_split
from luthier.modeling.loading import load_model, load_tokenizer, save_adapter, save_model
from luthier.modeling.text import IGNORED, Encoded, encode_conversation
from luthier.training.trainer import train_tokens
from luthier_plugins.sft.config import SftConfig


class Sft:
    """The stage ``sft``."""

    def __init__(self, config: SftConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        source = context.input("model")
        datasets = context.inputs("data")
        tokenizer = load_tokenizer(source)
        rows = [row for item in datasets for row in require_split(item, "train")]
        held_out = [row for item in datasets for row in read_split(item, "validation")]
        train = self._encode(rows, tokenizer, source, context)
        validation = self._encode(held_out, tokenizer, source, context)
        model = self._model(source, context)
        trained = sum(label != IGNORED for row in train for label in row.labels)
        facts = train_tokens(model, tokenizer, train, validation, self.config, context)
        save = save_adapter if self.config.adapter is not None or source.kind == "adapter" else save_model
        return {**save(model, source, context.out), "training": {**facts, "rows": len(train), "tokens": trained}}

    def _model(self, source: Artifact, context: StageContext) -> Any:
        if self.config.adapter is None:
            return load_model(source, trainable=True)
        adapter: Adapter = context.component(self.config.adapter)
        return adapter.wrap(load_model(source, options=adapter.load_options()))

    def _encode(self, rows: Sequence[Row], tokenizer: Any, source: Artifact, context: StageContext) -> list[Encoded]:
        encoded = [encode_conversation(tokenizer, row["messages"], source.facts["stop_token_ids"]) for row in rows]
        short = [row for row in encoded if len(row.input_ids) <= self.config.max_length]
        if len(short) < len(encoded):
            longest = max(len(row.input_ids) for row in encoded)
            over = len(encoded) - len(short)
            text = f"{over} of {len(encoded)} rows are longer than max_length={self.config.max_length}"
            if self.config.on_long == "fail" or not short:
                raise DataError(text, hint=f"the longest has {longest} tokens; raise `max_length` or shorten the rows")
            context.warn(f"{text} and were left out; the longest has {longest} tokens")
        return short
