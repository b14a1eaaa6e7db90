"""The whole of a training stage: load, encode, train, store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from luthier.api.artifact import Artifact
from luthier.api.context import StageContext
from luthier.api.errors import ModelError
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
    padding_of,
    save_adapter,
    save_model,
    stored_dtype,
    stored_dtypes,
)
from luthier.modeling.text import UNDATED, template_of, uses_clock
from luthier.training.encoding import EncodedRow, RowEncoder
from luthier.training.storing import Rounding, Storage, storage_of, trained
from luthier.training.trainer import Trained, train

LOST = 0.05
"""The share of a change that may be rounded away without a warning."""
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
    result = train(model, padding_of(tokenizer), rows, validation, config, context)
    natural, usual = ({}, torch.float32) if adapter else (stored_dtypes(source), stored_dtype(source))
    before = iter(start) if adapter else _weights_of(source)
    rounding = Rounding(config.rounding, context.seed)
    storage = storage_of(model, before, natural, usual, config.save_dtype, rounding)
    facts = _stored(storage, result, context)
    if adapter:
        made = save_adapter(model, source, context.out, options, storage.dtype)
    else:
        # Buffers are not trained: they stay what they were.
        made = save_model(model, source, context.out, {**natural, **storage.dtypes}, storage.dtype)
    counts = {"rows": len(rows), "tokens": sum(row.targets for row in rows)}
    found = {"left_out": dict(encoder.left_out), "notes": dict(encoder.notes)}
    return {**made, "training": {**facts, **counts, **{name: value for name, value in found.items() if value}}}


def _stored(storage: Storage, result: Trained, context: StageContext) -> Facts:
    """The facts of training, those of the weights as they are stored."""
    facts: Facts = {**result.facts, "stored": dict(storage.receipt)}
    if "rounding" in storage.receipt:
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


def _weights_of(source: Artifact) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters in float32, by their names in transformers."""
    for name, value in load_model(source).named_parameters():
        yield name, value.detach()


def _load(config: TrainingConfig, source: Artifact, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """The model to train, and how its base was loaded."""
    chosen = {"dtype": "bfloat16"} if config.dtype == "bf16" else {}
    if config.adapter is None:
        # An adapter is trained further on its base as it was loaded when the adapter was made; of one from outside
        # that is not known, and the recipe says it.
        options = dict(source.facts.get("load_options", chosen if source.kind == "adapter" else {}))
        model: Any = load_model(source, trainable=True, options=options)
        _check_precision(model)
        return model, options
    adapter: Adapter[Any] = context.build(config.adapter)
    options = {**chosen, **adapter.load_options()}
    model = adapter.wrap(load_model(source, options=options))
    check_selectors(model)
    _check_precision(model)
    everything = getattr(config.adapter.config, "target_modules", None) == "all-linear"
    missed = without_adapter(model) if everything else None
    if missed:
        context.warn(missed)
    return model, options


def _check_precision(model: Any) -> None:
    """Refuse to train weights of fewer bits: small updates would be rounded away step by step.

    Raises:
        ModelError: an adapter trains copies of modules of its base, which is loaded in another dtype.
    """
    odd = [name for name, value in trained(model) if value.is_floating_point() and value.dtype != torch.float32]
    if odd:
        raise ModelError(
            f"the adapter trains whole weights of its base ({odd[0]}), which is loaded in fewer bits than float32: "
            "small updates would be rounded away",
            hint="leave `dtype` out, or make an adapter without `modules_to_save`",
        )
