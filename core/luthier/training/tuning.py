"""The whole of a training stage: load, encode, train, store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from luthier.api.artifact import Artifact
from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.api.stages import Facts
from luthier.api.training import Adapter
from luthier.api.tuning import TrainingConfig, TuningConfig
from luthier.artifacts.datasets import Split, check_has
from luthier.artifacts.digest import digest_value
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import positions_of
from luthier.artifacts.pace import note_pace
from luthier.artifacts.tensors import model_tensors
from luthier.modeling.adapter_targets import check_selectors, without_adapter
from luthier.modeling.fresh_adapters import INITIAL
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
from luthier.modeling.precision import Precision, best_precision, has_bf16
from luthier.modeling.shards import tensors_of
from luthier.modeling.text import UNDATED, template_of, uses_clock
from luthier.training.chosen import choose
from luthier.training.encoding import EncodedRow
from luthier.training.experts import COUNTED, load_of, shares_of
from luthier.training.memory import check_room
from luthier.training.mixing import Mix
from luthier.training.preview import looked_at
from luthier.training.receipt import check_reloads, described, logits_of, probe_of, shown_rows
from luthier.training.rows import RowSource
from luthier.training.run import Material, Trained, train
from luthier.training.storing import Rounding, Storage, storage_of, trained

LOST = 0.05
"""The share of a change that may be rounded away without a warning."""
Encode = Callable[[RowSource, Sequence[Artifact], Split], Sequence[EncodedRow]]
"""Gives the training rows of a split of datasets."""


def tune(config: TuningConfig, context: StageContext) -> Facts:
    """Run a stage that trains on the answers of its rows."""

    return run_training(config, context, RowSource.answers)


def run_training(config: TrainingConfig, context: StageContext, encode: Encode) -> Facts:
    """Run a training stage.

    Args:
        config: Its config.
        context: Its context.
        encode: Gives its rows as tokens.
    """
    source = context.artifact(config.model)
    datasets = context.artifacts(config.data)
    for item in datasets:
        check_has(item, "train")
    tokenizer: Any = load_tokenizer(source)
    if uses_clock(template_of(tokenizer)) and context.date is None:
        context.warn(
            f"the chat template writes the day: it is told {UNDATED.isoformat()}; "
            "`date: YYYY-MM-DD` in the recipe sets it"
        )
    source_of = RowSource(source, config, context, positions_of(model_folder(source)))
    rows, validation = encode(source_of, datasets, "train"), encode(source_of, datasets, "validation")
    if context.preview:
        return looked_at(config, source_of, {"train": rows, "validation": validation}, tokenizer, context.preview)
    precision = _precision(config, source, context)
    check_room(config, source, context)
    model, options = _load(config, source, context, precision)
    # Quantized weights are where they were made.
    if not getattr(model, "is_quantized", False):
        model.to(context.device)
    choose(model, config, rows, context)
    adapter = config.adapter is not None or source.kind == "adapter"
    # An adapter is small; a full model is read once more when it is needed.
    start = [(name, value.detach().cpu().clone()) for name, value in trained(model)] if adapter else []
    key = _key(config, context, options, precision)
    mix = _mix(config, rows, context)
    scale, describe = _scale_of(config, context), partial(described, tokenizer)
    material = Material(rows, validation, padding_of(tokenizer), key, scale, mix, describe)
    counted = [rows[place] for place in range(min(COUNTED, len(rows)))]
    load = shares_of(load_of(model, counted))
    result = train(model, material, config, context, precision)
    natural, usual = ({}, torch.float32) if adapter else (stored_dtypes(source), stored_dtype(source))
    before = iter(start) if adapter else _weights_of(source, [name for name, _ in trained(model)])
    rounding = Rounding(config.rounding, context.seed)
    storage = storage_of(model, before, natural, usual, config.save_dtype, rounding)
    facts = {**_stored(storage, result, context), "first_rows": shown_rows(rows, tokenizer)}
    if load:
        facts["router_load"] = {"before": load, "after": shares_of(load_of(model, counted))}
    probe = probe_of(rows)
    logits = logits_of(model, probe)
    if adapter:
        initial = context.scratch / INITIAL
        made = save_adapter(model, source, context.out, options, storage.dtype, initial if initial.exists() else None)
    else:
        # Buffers are not trained: they stay what they were.
        made = save_model(model, source, context.out, {**natural, **storage.dtypes}, storage.dtype)
    # Two models would not fit where one does.
    del model, result
    facts["reload_difference"] = check_reloads(context.out, source, options, probe, logits, adapter=adapter)
    if (speed := facts["trained"].get("tokens_per_second")) and "parameters" in source.facts:
        note_pace(context.cache, config.work, source.facts["parameters"], speed)
    counts: Facts = {"rows": len(rows), "tokens": _targets(rows), "precision": precision}
    if mix is not None:
        counts["rows_in_epoch"] = list(mix.taken)
    found = {
        "left_out": dict(source_of.left_out),
        "notes": dict(source_of.notes),
        "sources": source_of.sources["train"],
    }
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


def _weights_of(source: Artifact, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters by their names in transformers: one after the other from its files, or all at once where
    the files call them otherwise, as they do experts that transformers fuses."""
    if set(names) <= model_tensors(source.path).keys():
        yield from tensors_of(source.path)
        return
    for name, value in load_model(source).named_parameters():
        yield name, value.detach()


def _scale_of(config: TrainingConfig, context: StageContext) -> Callable[[str], float]:
    """By what the learning rate of a parameter is multiplied."""
    if config.adapter is None:
        return lambda name: 1.0
    adapter: Adapter[Any] = context.build(config.adapter)
    return adapter.learning_rate_scale


def _mix(config: TrainingConfig, rows: Sequence[EncodedRow], context: StageContext) -> Mix | None:
    """Which rows an epoch takes of datasets that have weights."""
    if config.weights is None:
        return None
    mix = Mix.of(rows.parts, config.weights)  # type: ignore[attr-defined] - what several datasets give
    told = ", ".join(f"{taken} of {size}" for taken, size in zip(mix.taken, mix.sizes, strict=True))
    context.log(f"an epoch takes {told} rows")
    if 0 in mix.taken:
        context.warn(f"`weights` leave nothing of a dataset: an epoch takes {told} rows")
    return mix


def _targets(rows: Sequence[EncodedRow]) -> int:
    """How many tokens are trained."""
    known = getattr(rows, "targets", None)
    return sum(row.targets for row in rows) if known is None else int(known.sum(dtype="int64"))


def _key(config: TrainingConfig, context: StageContext, options: Mapping[str, Any], precision: Precision) -> str:
    """Identifies the model as it is before training, and its rows: what their reference log-probabilities come from."""
    adapter = None if config.adapter is None else [config.adapter.name, config.adapter.config.model_dump(mode="json")]
    return digest_value(
        {
            "model": context.artifact(config.model).key,
            "adapter": [adapter, context.seed if adapter else None],
            "options": dict(options),
            "precision": precision,
            "rows": [item.key for item in context.artifacts(config.data)],
            "of": [config.max_length, config.trained_answers, str(context.date)],
        }
    )


def _precision(config: TrainingConfig, source: Artifact, context: StageContext) -> Precision:
    """What passes are computed in; a stage that is resumed computes as it did before."""
    if "bf16" in (config.precision, config.dtype) and context.device != "cpu" and not has_bf16():
        raise ModelError(
            "this GPU has no bfloat16, which `precision` or `dtype` asks for", hint="leave it out, or set it to `fp32`"
        )
    if config.precision != "auto":
        return config.precision
    noted = context.scratch / "precision"
    if not noted.exists():
        width = read_json(model_folder(source) / "config.json").get("hidden_size") or 0
        noted.write_text(best_precision(context.device, width, context.cache), encoding="utf-8")
    return "bf16" if noted.read_text(encoding="utf-8") == "bf16" else "fp32"


def _attention(config: TrainingConfig, context: StageContext) -> str | None:
    """transformers' name for how attention is computed; None: as it does by itself.

    Raises:
        ModelError: this device cannot.
    """
    if config.attention == "auto":
        return None
    if config.attention != "flash":
        return config.attention
    if context.device == "cpu":
        raise ModelError("flash attention wants a GPU", hint="leave `attention` out, or set `attention: sdpa`")
    if find_spec("flash_attn") is not None:
        return "flash_attention_2"
    if find_spec("kernels") is not None:
        return "kernels-community/flash-attn2"
    raise ModelError("flash attention is not installed", hint="pip install flash-attn, or pip install kernels")


def _load(
    config: TrainingConfig, source: Artifact, context: StageContext, precision: Precision
) -> tuple[Any, dict[str, Any]]:
    """The model to train, and how its base was loaded."""
    attention = _attention(config, context)
    dtype = precision if config.dtype == "auto" else config.dtype
    chosen = {"dtype": "bfloat16"} if dtype == "bf16" else {}
    if config.adapter is None:
        # An adapter is trained further on its base as it was loaded when the adapter was made; of one from outside
        # that is not known, and the recipe says it.
        options = dict(source.facts.get("load_options", chosen if source.kind == "adapter" else {}))
        model: Any = load_model(source, trainable=True, options=options, attention=attention)
        _check_precision(model)
        return model, options
    adapter: Adapter[Any] = context.build(config.adapter)
    options = {**chosen, **adapter.load_options()}
    model = adapter.wrap(load_model(source, options=options, attention=attention))
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
