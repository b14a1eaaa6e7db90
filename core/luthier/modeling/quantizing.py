"""A quantized model folder: written by a quantizer, completed with its texts, and compared with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.api.artifact import Artifact
from luthier.api.config import Use
from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.api.serving import Quantizer
from luthier.api.stages import Facts
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.models import architecture_of, model_facts
from luthier.artifacts.tensors import model_tensors, own_tensors, tensor_headers, with_true_ties
from luthier.modeling.calibration import texts_of, tuned_on
from luthier.modeling.compare import compared, sequences_of
from luthier.modeling.hub_folder import lost_in_version_4, model_config, write_texts
from luthier.modeling.loading import load_tokenizer, stream_client
from luthier.modeling.streamed import Streamed

FEWEST = 0.5
"""Bytes of a weight with four bits: what a quantized folder takes at least."""
FLOATS = ("F64", "F32", "F16", "BF16")
FEW = 4
"""Bits of a weight whose products are computed in half precision."""
ALLOWANCE = {"float16": 0.01, "bfloat16": 0.03}
"""What computing in a dtype may add to the mean KL divergence, in nats."""
FEW_TEXTS = 8
"""Texts on which that is compared: CPUs are slow at it."""
FINER = (
    "choose more bits or smaller groups, `skip` sensitive layers, name `calibration` data that resembles real use, "
    "or raise `max_kl`"
)


def refuse_quantized(model: Artifact, what: str) -> None:
    """Refuse a model that is quantized already.

    Args:
        model: The model.
        what: What was to be done, for the message.

    Raises:
        ModelError: it is.
    """
    if "quantization" in model.facts:
        raise ModelError(
            f"the model is quantized already ({model.facts['quantization']['method']}) and cannot be {what}",
            where=str(model.path),
            hint="take the model that it was made from",
        )


def quantize(
    model: Artifact, source: Path, use: Use, data: Sequence[Artifact], max_kl: float | None, context: StageContext
) -> Facts:
    """Write a quantized folder into the context's folder, and compare it with the model.

    Args:
        model: The model or adapter.
        source: Its full weights.
        use: The quantizer.
        data: The calibration data.
        max_kl: The largest mean KL divergence; None: what the quantizer says.
        context: The stage's context.

    Returns:
        The facts of a model, with `quantization`: the quantizer and its settings, layers, and how far off it is.

    Raises:
        ModelError: it is too far off, or reads text differently.
    """
    quantizer: Quantizer[Any] = context.build(use)
    parameters: int = model_facts(source)["parameters"]
    check_disk_space(context.out, int(FEWEST * parameters), "the quantized folder")
    texts = texts_of(data, load_tokenizer(model)) if data else iter(())
    about = quantizer.quantize(replace(model, kind="model", path=source), texts, context.out)
    config = read_json(source / "config.json")
    dtype: str = about.pop("dtype")
    settings = {"quantization_config": about.pop("quantization_config")}
    write_folder_texts(model, source, dtype, settings, context)
    limit = quantizer.largest_kl if max_kl is None else max_kl
    fewer = _quantized_entries(source, context.out)
    if fewer < parameters / 2:
        context.warn(f"only {fewer:,} of {parameters:,} weights have fewer bits: the others stay in {dtype}")
    verdict = check_folder(model, source, limit, FINER, context, computed_in(settings["quantization_config"], dtype))
    described = {
        "method": use.name,
        **use.config.model_dump(mode="json"),
        **about,
        "quantized_parameters": fewer,
        **verdict,
    }
    return {
        **model_facts(context.out),
        "architecture": architecture_of(config),
        "parameters": parameters,
        "stored_as": dtype,
        "quantization": described,
        "stop_token_ids": model.facts["stop_token_ids"],
    }


def write_folder_texts(
    model: Artifact, source: Path, dtype: str, settings: dict[str, Any], context: StageContext
) -> None:
    """Write config, tokenizer and what else belongs to a folder that every client loads.

    Args:
        model: The model or adapter.
        source: Its full weights.
        dtype: What the weights are stored as, or what is not quantized of them.
        settings: What the config says beside.
        context: The stage's context.
    """
    config, stored = read_json(source / "config.json"), tensor_headers(source)
    config = with_true_ties(config, stored, own_tensors(source, config, stored))
    write_json(context.out / "config.json", model_config(config, dtype) | settings)
    lost = lost_in_version_4(config)
    if lost:
        context.warn(lost)
    write_texts(source, model, context.out)


def _quantized_entries(source: Path, out: Path) -> int:
    """How many weights of a model are in a folder with fewer bits: all but those that are there as floats."""
    whole, written = model_tensors(source), tensor_headers(out)
    floats = [name for name in whole if name in written and written[name].dtype in FLOATS]
    return sum(math.prod(whole[name].shape) for name in whole.keys() - set(floats))


def computed_in(settings: Mapping[str, Any], dtype: str) -> str | None:
    """The dtype in which servers compute with a folder, where that is none of the model's own: weights in float16 and
    in 4 bits are there for it; None: any.

    Args:
        settings: Its ``quantization_config``; empty where it has none.
        dtype: What the weights are stored as, or what is not quantized of them.
    """
    few = settings.get("load_in_4bit") or settings.get("bits") == FEW
    return dtype if dtype in ALLOWANCE and (few or dtype == "float16") else None


def check_folder(
    model: Artifact, source: Path, limit: float, hint: str, context: StageContext, computed: str | None = None
) -> Facts:
    """Compare the written folder with the model.

    Args:
        model: What it was made from.
        source: Its full weights.
        limit: The largest mean KL divergence, in nats.
        hint: What helps where it is larger.
        context: The stage's context, in whose folder it is.
        computed: The dtype that servers compute in, as well; where it is given, that is compared, too.

    Returns:
        What a manifest says of the comparison.

    Raises:
        ModelError: it reads or thinks differently.
    """
    loaded = replace(model, kind="model", path=context.out)
    tokenizer, client = load_tokenizer(loaded), stream_client(loaded, context.scratch / "floats")
    right = load_tokenizer(model)
    sequences = sequences_of(right, tuned_on(model))
    if sequences_of(tokenizer, tuned_on(model)) != sequences:
        raise ModelError("the written tokenizer reads text differently", where=str(context.out))
    reference = Streamed(source)
    verdict = compared(reference, client, sequences)
    context.log(f"KL {verdict.kl:.2g} nats, same best token {verdict.top1:.0%}")
    if not verdict.kl <= limit:
        raise ModelError(
            f"the folder does not behave like the model it came from: mean KL divergence {verdict.kl:.3g} nats, "
            f"at most {limit:g} is expected",
            hint=hint,
        )
    if computed is None:
        return verdict.facts()
    client = stream_client(loaded, context.scratch / "floats", getattr(torch, computed))
    in_half = compared(reference, client, sequences[:: math.ceil(len(sequences) / FEW_TEXTS)])
    context.log(f"computed in {computed}: KL {in_half.kl:.2g} nats")
    if not in_half.kl <= limit + ALLOWANCE[computed]:
        what = (
            "what it computes is not finite" if math.isnan(in_half.kl) else f"mean KL divergence {in_half.kl:.3g} nats"
        )
        raise ModelError(
            f"computed in {computed}, as servers do, the folder does not behave like the model: {what}, and in float32 "
            f"{verdict.kl:.3g} nats",
            hint="its activations do not fit into float16: store it as bfloat16, or choose int8 or fp8"
            if computed == "float16"
            else hint,
        )
    return {**verdict.facts(), "kl_computed_in": {computed: in_half.kl}}
