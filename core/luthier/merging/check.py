"""What cannot be merged is refused here, from headers and configs alone: every problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from luthier.api import ModelError
from luthier.artifacts.texts import has_tokenizer, same_tokenizer
from luthier.merging.api import Divisor, cancel
from luthier.merging.config import MergeConfig, as_method
from luthier.merging.files import DTYPES
from luthier.merging.jobs import TensorJob
from luthier.merging.layout import LAYER, Inputs, layers_of
from luthier.merging.reader import Source
from luthier.merging.stacking import kinds_by

SAME = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "hidden_act",
        "tie_word_embeddings", "sliding_window", "n_head", "n_layer", "hidden_activation", "activation_function",
        "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "query_pre_attn_scalar",
        "attn_logit_softcapping", "final_logit_softcapping", "layer_types", "no_rope_layers", "sliding_window_pattern",
        "use_sliding_window", "max_window_layers", "logit_scale", "logits_scaling", "embedding_multiplier",
        "residual_multiplier", "attention_multiplier", "norm_topk_prob", "scale_attn_by_inverse_layer_idx")  # fmt: skip
BY_LAYER = ("num_hidden_layers", "n_layer", "layer_types", "no_rope_layers", "max_window_layers")
"""What stacks of layers may differ in."""
WINDOWS = ("sliding_window", "max_window_layers")
"""What has no meaning where no window slides; a base and its own chat model often differ in it."""
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
LARGEST_EPSILON = 1e-4
"""Up to here, the epsilon of a norm changes next to nothing; a base and its own chat model sometimes differ in it."""
SHOWN = 5
ORIGINAL = "original_max_position_embeddings"
IMPLIED = ("partial_rotary_factor", ORIGINAL)
"""Rotary settings that transformers 5 writes down where version 4 left them to the architecture."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "lm_head.bias", "embed_in.weight",
              "embed_out.weight", "word_embeddings.weight")  # fmt: skip
DEFAULT_THETA = 10000.0
"""Theta where a config names none."""
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64")


def check(config: MergeConfig, inputs: Inputs) -> None:
    """Refuse models that do not fit together.

    Raises:
        ModelError: with every problem that was found.
    """
    refuse([*input_problems(config, inputs), *unstackable(config, inputs)], "merged")


def check_stored(inputs: Inputs, what: str) -> None:
    """Refuse models whose weights cannot be read as plain numbers.

    Args:
        what: What was to be done with them, for the message.

    Raises:
        ModelError: with every problem that was found.
    """
    refuse((text for model in inputs.all for text in odd_dtypes(model)), what)


def check_same(inputs: Inputs) -> None:
    """Refuse models that are not of one architecture and the same shapes, or are quantized.

    Raises:
        ModelError: with every problem that was found.
    """
    lead = inputs.lead
    others = [other for other in inputs.all if other is not lead]
    found = [text for model in inputs.all for text in odd_dtypes(model)]
    found += [
        text
        for other in others
        for part in (_other_config(lead, other, stacked=False), _other_tensors(lead, other, ignore_rows=False))
        for text in part
    ]
    refuse(found, "compared")


def refuse(found: Iterable[str], what: str) -> None:
    """Raise what was found, all at once.

    Args:
        found: The problems; with none, nothing happens.
        what: What was to be done with the models.

    Raises:
        ModelError: with every problem.
    """
    texts = list(dict.fromkeys(found))
    if texts:
        text = texts[0] if len(texts) == 1 else "\n".join([f"{len(texts)} problems:", *texts])
        raise ModelError(f"the models cannot be {what}: {text}", hint="nothing was read or written")


def input_problems(config: MergeConfig, inputs: Inputs) -> Iterator[str]:
    """What does not fit together, by configs and headers; of slices, see `unstackable`."""
    lead = inputs.lead
    for other in inputs.all:
        yield from odd_dtypes(other)
        if other is not lead:
            yield from _other_config(lead, other, stacked=bool(config.slices))
            if config.tokenizer == "base":
                yield from _other_tokenizer(lead, other)
            if not config.slices:
                yield from _other_tensors(lead, other, ignore_rows=config.tokenizer != "base")


def odd_dtypes(model: Source) -> Iterator[str]:
    """What is stored in a form that cannot be read as plain numbers."""
    odd = sorted(name for name, header in model.headers.items() if header.dtype not in (*DTYPES, *WHOLE))
    quantized = "quantization_config" in model.config
    if odd or quantized:
        what = f"{odd[0]} is stored as {model.headers[odd[0]].dtype}" if odd else "its weights are quantized"
        yield f"{model.label}: {what}; take the full-precision model, and quantize what is made of it"


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the rotary embedding, the same whether transformers 4 or 5 wrote it.

    Version 5 has everything in one mapping, or in one for each kind of attention; before, theta, the theta of sliding
    attention and what is stretched stood in the config itself.
    """
    settings: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {name: part for name, part in settings.items() if isinstance(part, Mapping)}
    main: Mapping[str, Any] = kinds.get("full_attention", settings)
    theta = main.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    local = kinds.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq"))
    share = main.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    original = main.get(ORIGINAL, config.get(ORIGINAL))
    moved = ("rope_theta", "rope_type", "type", *IMPLIED)
    return {
        "rope_theta": float(theta or DEFAULT_THETA),
        "rope_type": main.get("rope_type") or main.get("type") or "default",
        **({} if local is None else {"theta of sliding attention": float(local)}),
        **{key: value for key, value in zip(IMPLIED, (share, original), strict=True) if value is not None},
        **{key: value for key, value in main.items() if key not in moved and not isinstance(value, Mapping)},
    }


def _other_config(lead: Source, other: Source, *, stacked: bool) -> Iterator[str]:
    pair = f"{lead.label} and {other.label}"
    windowless = all(model.config.get("use_sliding_window") is False for model in (lead, other))
    for key in SAME:
        if (stacked and key in BY_LAYER) or (windowless and key in WINDOWS):
            continue
        ours, theirs = lead.config.get(key), other.config.get(key)
        if key in EPSILONS and max(ours or 0.0, theirs or 0.0) <= LARGEST_EPSILON:
            continue
        if ours != theirs and ours is not None and theirs is not None:
            yield f"{pair} differ in {key}: {ours} and {theirs}"
    left, right = rope_of(lead.config), rope_of(other.config)
    for key in sorted({*left, *right}):
        implied = key in IMPLIED and not (key in left and key in right)
        if left.get(key) != right.get(key) and not implied:
            yield f"{pair} differ in the rotary embedding's {key}: {left.get(key)} and {right.get(key)}"


def _other_tokenizer(lead: Source, other: Source) -> Iterator[str]:
    without = [model.label for model in (lead, other) if not has_tokenizer(model.artifact.path)]
    if len(without) == 1:
        yield f"{without[0]} has no tokenizer: put that of its model beside the weights"
    elif not same_tokenizer(lead.artifact.path, other.artifact.path):
        yield f"{lead.label} and {other.label} have different tokenizers; `tokenizer: union` joins them"


def _other_tensors(lead: Source, other: Source, *, ignore_rows: bool) -> Iterator[str]:
    for name_of, missing in (
        (other.label, sorted(set(lead.headers) - set(other.headers))),
        (lead.label, sorted(set(other.headers) - set(lead.headers))),
    ):
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            yield f"{name_of} lacks the tensors {', '.join(missing[:SHOWN])}{more}"
    shared = [name for name in lead.headers if name in other.headers]
    odd = [name for name in shared if not _fits(name, lead.headers[name].shape, other.headers[name].shape, ignore_rows)]
    kinds = [name for name in shared if (lead.headers[name].dtype in DTYPES) != (other.headers[name].dtype in DTYPES)]
    for name in kinds[:SHOWN]:
        yield (
            f"{name} is stored as {lead.headers[name].dtype} in {lead.label}, "
            f"as {other.headers[name].dtype} in {other.label}"
        )
    for name in odd[:SHOWN]:
        yield (
            f"the shape of {name} differs: {list(lead.headers[name].shape)} in {lead.label}, "
            f"{list(other.headers[name].shape)} in {other.label}"
        )
    if len(odd) > SHOWN:
        yield f"the shapes of {len(odd) - SHOWN} more tensors differ"


def _fits(name: str, left: Sequence[int], right: Sequence[int], ignore_rows: bool) -> bool:
    if ignore_rows and is_vocabulary(name):
        return tuple(left[1:]) == tuple(right[1:])
    return tuple(left) == tuple(right)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for every token."""
    return name.endswith(VOCABULARY)


def unstackable(config: MergeConfig, inputs: Inputs) -> Iterator[str]:
    """What does not fit in a stack of slices: every layer's tensors, and those outside layers."""
    if not config.slices:
        return
    lead = inputs.lead
    stacks = layers_of(list(lead.headers))
    if len(stacks) != 1:
        named = ", ".join(sorted(stacks)) or "none"
        yield f"{lead.label} has {len(stacks)} stacks of layers ({named}); slices need one"
        return
    (head,) = stacks
    outside = _outside(lead)
    placed = iter(inputs.models)
    kinds = kinds_by(inputs.all)
    for place, part in enumerate(config.slices):
        models = [(next(placed), source.layers) for source in part.sources]
        base = inputs.base_of(place)
        if base is not None:
            models.append((base, part.of_base))
        short = False
        for model, layers in models:
            count = layers_of(list(model.headers)).get(head, 0)
            if layers[1] > count:
                short = True
                yield f"{model.label} has {count} layers; a slice takes [{layers[0]}, {layers[1]}]"
            if model is not lead:
                rows = config.tokenizer != "base"
                yield from _differences(outside, _outside(model), lead.label, model.label, ignore_rows=rows)
        if short:
            continue
        for step in range(models[0][1][1] - models[0][1][0]):
            first, *others = [(model, layers[0] + step) for model, layers in models]
            found = _layer(first[0], f"{head}{first[1]}.")
            kind = kinds(first[0]).at(first[1])
            for model, number in others:
                yield from _differences(found, _layer(model, f"{head}{number}."), first[0].label, model.label)
                other = kinds(model).at(number)
                for key in (key for key in kind if other.get(key) != kind[key]):
                    yield (
                        f"{key} is {kind[key]} in layer {first[1]} of {first[0].label}, and {other.get(key)} in "
                        f"layer {number} of {model.label}"
                    )


def _outside(model: Source) -> dict[str, tuple[int, ...]]:
    return {name: header.shape for name, header in model.headers.items() if LAYER.match(name) is None}


def _layer(model: Source, start: str) -> dict[str, tuple[int, ...]]:
    return {name[len(start) :]: header.shape for name, header in model.headers.items() if name.startswith(start)}


def _differences(
    left: Mapping[str, tuple[int, ...]],
    right: Mapping[str, tuple[int, ...]],
    one: str,
    two: str,
    *,
    ignore_rows: bool = False,
) -> Iterator[str]:
    for name in sorted({*left, *right}):
        both = name in left and name in right
        if not both or not _fits(name, left[name], right[name], ignore_rows):
            shapes = [list(found[name]) if name in found else "none" for found in (left, right)]
            yield f"{name} is {shapes[0]} in {one} and {shapes[1]} in {two}"


def weights_that_cancel(config: MergeConfig, jobs: Sequence[TensorJob]) -> Iterator[str]:
    """Weights that sum to zero for some parameters, where the method divides by their sum.

    Args:
        config: The merge.
        jobs: The parameters with their weights.
    """
    shared = as_method(config.method).divides
    own: dict[int | None, Divisor] = {
        place: as_method(use).divides for place, use in config.methods_of_slices().items()
    }
    odd = [job.parameter.name for job in jobs if cancel(job.numbers, own.get(job.slice, shared))]
    if odd:
        yield (
            f"the weights sum to zero for {len(odd)} parameters, and {config.method.name} divides by their sum "
            f"(change the gradients or filters of `weights`): {', '.join(odd[:SHOWN])}"
        )


def idle_filters(values: Any, names: Sequence[str]) -> list[str]:
    """The filters among settings that no parameter's name contains.

    Args:
        values: Settings as plain values, however deep.
        names: The parameters.
    """
    found: list[str] = []
    if isinstance(values, Mapping):
        inside: Mapping[str, Any] = values
        pattern = inside.get("filter")
        if isinstance(pattern, str) and pattern != "*" and not any(pattern in name for name in names):
            found.append(pattern)
        found += [text for value in inside.values() for text in idle_filters(value, names)]
    elif isinstance(values, (list, tuple)):
        several: Sequence[Any] = values
        found += [text for value in several for text in idle_filters(value, names)]
    return list(dict.fromkeys(found))
