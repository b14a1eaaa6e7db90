"""A quantized model folder: written by a quantizer, completed with its texts, and compared with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.api.artifact import Artifact
from luthier.api.config import Use
from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.api.serving import Quantizer
from luthier.api.stages import Facts
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.models import architecture_of, model_facts
from luthier.artifacts.tensors import own_tensors, tensor_headers, with_true_ties
from luthier.modeling.calibration import texts_of, tuned_on
from luthier.modeling.compare import Comparison, compared, sequences_of
from luthier.modeling.hub_folder import lost_in_version_4, model_config, write_texts
from luthier.modeling.loading import load_client, load_model, load_tokenizer, to_best_device

FEWEST = 0.5
"""Bytes of a weight with four bits: what a quantized folder takes at least."""
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
    verdict = check_folder(model, limit, FINER, context)
    described = {"method": use.name, **use.config.model_dump(mode="json"), **about, **verdict.facts()}
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


def check_folder(model: Artifact, limit: float, hint: str, context: StageContext) -> Comparison:
    """Compare the written folder with the model.

    Raises:
        ModelError: it reads or thinks differently.
    """
    loaded = replace(model, kind="model", path=context.out)
    tokenizer, client = load_tokenizer(loaded), load_client(loaded, context.scratch / "floats")
    right = load_tokenizer(model)
    sequences = sequences_of(right, tuned_on(model))
    if sequences_of(tokenizer, tuned_on(model)) != sequences:
        raise ModelError("the written tokenizer reads text differently", where=str(context.out))
    verdict = compared(to_best_device(load_model(model)), client, sequences)
    context.log(f"KL {verdict.kl:.2g} nats, same best token {verdict.top1:.0%}")
    if not verdict.kl <= limit:
        raise ModelError(
            f"the folder does not behave like the model it came from: mean KL divergence {verdict.kl:.3g} nats, "
            f"at most {limit:g} is expected",
            hint=hint,
        )
    return verdict
