"""Direct preference optimization."""

from __future__ import annotations

from luthier.api import DataError, Facts, PreferenceLoss, StageContext
from luthier.artifacts.datasets import require_split
from luthier.train.loading import load_model, load_tokenizer, save_adapter, save_model
from luthier.train.preference import EncodedPair, encode_pair, train_pairs
from luthier_plugins.dpo.config import DpoConfig


class Dpo:
    """The stage ``dpo``."""

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        source = context.input("model")
        tokenizer = load_tokenizer(source)
        stops = source.facts["stop_token_ids"]
        rows = require_split(context.input("data"), "train")
        pairs = [encode_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], stops) for row in rows]
        pairs = self._short_enough(pairs, context)
        loss: PreferenceLoss = context.component(self.config.loss)
        model = load_model(source, trainable=True)
        facts = train_pairs(model, tokenizer, pairs, loss, self.config.beta, self.config, context)
        save = save_adapter if source.kind == "adapter" else save_model
        return {**save(model, source, context.out), "training": {**facts, "pairs": len(pairs)}}

    def _short_enough(self, pairs: list[EncodedPair], context: StageContext) -> list[EncodedPair]:
        short = [pair for pair in pairs if len(pair) <= self.config.max_length]
        over = len(pairs) - len(short)
        if over:
            text = f"{over} of {len(pairs)} pairs are longer than max_length={self.config.max_length}"
            if self.config.on_long == "fail" or not short:
                longest = max(len(pair) for pair in pairs)
                raise DataError(text, hint=f"the longest has {longest} tokens; raise `max_length`")
            context.warn(f"{text} and were left out")
        return short
