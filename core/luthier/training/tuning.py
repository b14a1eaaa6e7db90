"""The whole of a training stage: load, encode, train, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.api.artifact import Artifact
from luthier.api.context import StageContext
from luthier.api.data import Row
from luthier.api.stages import Facts
from luthier.api.training import Adapter
from luthier.api.tuning import TrainingConfig, TuningConfig
from luthier.artifacts.datasets import read_split, require_split
from luthier.modeling.loading import load_model, load_tokenizer, save_adapter, save_model
from luthier.training.encoding import EncodedRow, encode_rows
from luthier.training.trainer import train

Encode = Callable[[Any, Sequence[Row]], list[EncodedRow]]
"""Makes training rows with a tokenizer."""


def tune(config: TuningConfig, context: StageContext) -> Facts:
    """Run a stage that trains on the answers of its rows."""
    stops: list[int] = context.artifact(config.model).facts["stop_token_ids"]

    def encode(tokenizer: Any, rows: Sequence[Row]) -> list[EncodedRow]:
        return encode_rows(tokenizer, rows, stops, config, context) if rows else []

    return run_training(config, context, encode)


def run_training(config: TrainingConfig, context: StageContext, encode: Encode) -> Facts:
    """Run a training stage.

    Args:
        config: Its config.
        context: Its context.
        encode: Makes tokens of its rows.
    """
    source = context.artifact(config.model)
    datasets = context.artifacts(config.data)
    tokenizer: Any = load_tokenizer(source)
    rows = encode(tokenizer, [row for item in datasets for row in require_split(item, "train")])
    validation = encode(tokenizer, [row for item in datasets for row in read_split(item, "validation")])
    model, options = _load(config, source, context)
    facts = train(model, tokenizer.pad_token_id, rows, validation, config, context)
    if config.adapter is not None or source.kind == "adapter":
        made = save_adapter(model, source, context.out, options)
    else:
        made = save_model(model, source, context.out)
    tokens = sum(row.targets for row in rows)
    return {**made, "training": {**facts, "rows": len(rows), "tokens": tokens}}


def _load(config: TrainingConfig, source: Artifact, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """The model to train, and how its base was loaded."""
    chosen = {"dtype": "bfloat16"} if config.dtype == "bf16" else {}
    if config.adapter is None:
        # An adapter is trained further on its base as it was loaded when the adapter was made; of one from outside
        # that is not known, and the recipe says it.
        options = dict(source.facts.get("load_options", chosen if source.kind == "adapter" else {}))
        return load_model(source, trainable=True, options=options), options
    adapter: Adapter[Any] = context.build(config.adapter)
    options = {**chosen, **adapter.load_options()}
    return adapter.wrap(load_model(source, options=options)), options
