"""The whole of a training stage: load, encode, train, store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from luthier.api.artifact import Artifact
from luthier.api.context import StageContext
from luthier.api.stages import Facts
from luthier.api.training import Adapter
from luthier.api.tuning import TrainingConfig, TuningConfig
from luthier.artifacts.datasets import Split, read_split, require_split
from luthier.artifacts.models import positions_of
from luthier.modeling.adapters import check_selectors, without_adapter
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import (
    load_model,
    load_tokenizer,
    model_folder,
    save_adapter,
    save_model,
    stored_dtype,
)
from luthier.modeling.text import UNDATED, template_of, uses_clock
from luthier.training.encoding import EncodedRow, RowEncoder
from luthier.training.storing import Storage, storage_of, trained
from luthier.training.trainer import Trained, train

Encode = Callable[[RowEncoder, Sequence[Artifact], Split], list[EncodedRow]]
"""Makes training rows of a split of datasets."""


def tune(config: TuningConfig, context: StageContext) -> Facts:
    """Run a stage that trains on the answers of its rows."""

    def encode(rows: RowEncoder, datasets: Sequence[Artifact], split: Split) -> list[EncodedRow]:
        return list(chain.from_iterable(rows.answers(item, split, read_split(item, split)) for item in datasets))

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
    for item in datasets:
        require_split(item, "train")
    tokenizer: Any = load_tokenizer(source)
    if uses_clock(template_of(tokenizer)) and context.date is None:
        context.warn(
            f"the chat template writes the day: it is told {UNDATED.isoformat()}; "
            "`date: YYYY-MM-DD` in the recipe sets it"
        )
    chat = ChatEncoder(tokenizer, source.facts["stop_token_ids"], context.date)
    encoder = RowEncoder(chat, config, context, positions_of(model_folder(source)))
    rows, validation = encode(encoder, datasets, "train"), encode(encoder, datasets, "validation")
    model, options = _load(config, source, context)
    adapter = config.adapter is not None or source.kind == "adapter"
    # An adapter is small; a full model is read once more when it is needed.
    start = [(name, value.detach().cpu().clone()) for name, value in trained(model)] if adapter else []
    result = train(model, tokenizer.pad_token_id, rows, validation, config, context)
    natural = torch.float32 if adapter else stored_dtype(source)
    before = iter(start) if adapter else _stored_weights(source)
    storage = storage_of(model, before, natural, config.save_dtype, config.rounding, context.seed)
    facts = _stored(storage, result, context)
    if adapter:
        made = save_adapter(model, source, context.out, options, storage.dtype)
    else:
        made = save_model(model, source, context.out, storage.dtype)
    counts = {"rows": len(rows), "tokens": sum(row.targets for row in rows)}
    found = {"left_out": dict(encoder.left_out), "notes": dict(encoder.notes)}
    return {**made, "training": {**facts, **counts, **{name: value for name, value in found.items() if value}}}


def _stored(storage: Storage, result: Trained, context: StageContext) -> Facts:
    """The facts of training, those of the weights as they are stored."""
    facts: Facts = {**result.facts, "stored": dict(storage.receipt)}
    if storage.dtype != torch.float32:
        lost = 1 - storage.receipt["survived"]
        name = storage.receipt["dtype"]
        if lost > LOST:
            context.warn(f"{lost:.0%} of what was trained is rounded away in {name}, which `save_dtype` asks for")
    elif "instead_of" in storage.receipt:
        other = storage.receipt["instead_of"]
        context.log(
            f"stored in float32: in {other['dtype']}, {1 - other['survived']:.0%} of what was trained would be rounded "
            "away"
        )
    if result.held_out is not None:
        facts["eval_loss"] = result.held_out()
    return facts


LOST = 0.05
"""The share of a change that may be rounded away without a warning."""


def _stored_weights(source: Artifact) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters as they are stored, by their names in transformers."""
    name = str(stored_dtype(source)).removeprefix("torch.")
    for parameter, value in load_model(source, options={"dtype": name}).named_parameters():
        yield parameter, value.detach()


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
    model: Any = adapter.wrap(load_model(source, options=options))
    check_selectors(model)
    missed = without_adapter(model)
    if missed:
        context.warn(missed)
    return model, options
