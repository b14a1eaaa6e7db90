"""Model folders, judged from their JSON files and safetensors headers alone. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from luthier.api.errors import ModelError
from luthier.artifacts.digest import digest_value
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import EMBEDDINGS, TIES, TensorHeader, head_of, own_tensors, tensor_headers
from luthier.artifacts.texts import (
    chat_template,
    copy_text_files,
    stop_token_ids,
    stop_tokens,
    tokenizer_digest,
    vocabulary_size,
)

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Under what conditions a model may be used: they hold for what is made of it, too."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
"""What configs call the most tokens that a model is made for."""

BLOCK = re.compile(r"\.\d+\.")
"""In the names of tensors that stand in a block."""


def positions_of(folder: Path) -> int | None:
    """How many tokens a model was made for at once, see `positions_in`."""
    return positions_in(read_json(folder / "config.json"))


def positions_in(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model was made for at once, by its config; None where it says nothing, as of recurrent ones."""
    config = _mapping(config.get("text_config")) or config
    known = next((config[name] for name in POSITIONS if isinstance(config.get(name), int)), None)
    rope = _mapping(config.get("rope_parameters")) or _mapping(config.get("rope_scaling"))
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if known is not None and isinstance(original, int) and isinstance(factor, int | float):
        # Stretched positions are written in either of the two.
        return max(known, int(original * factor))
    return known


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a config, empty where it is nothing of the kind."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def carry_text_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat templates, generation config and licence unchanged."""
    copy_text_files(source, out)
    carry_licences(source, out)


def carry_licences(source: Path, out: Path, label: str = "") -> None:
    """Copy what is said of the model's licence; what is there already stays.

    Args:
        label: What to call a file whose name is taken by another text: ``LICENSE`` becomes ``LICENSE.label``.
    """
    for path in {path for pattern in LICENCES for path in source.glob(pattern) if path.is_file()}:
        content = path.read_bytes()
        target = out / path.name
        if label and target.exists() and target.read_bytes() != content:
            target = out / f"{path.name}.{label}"
        if not target.exists():
            target.write_bytes(content)


def check_model_folder(folder: Path) -> dict[str, TensorHeader]:
    """Check a model folder before anything is loaded.

    Raises:
        ModelError: config or weights are missing or broken, or the tokenizer has more tokens than the
            embedding has rows.
    """
    config = read_json(folder / "config.json")
    headers = tensor_headers(folder)
    embedding = next((header for name, header in headers.items() if name.endswith(EMBEDDINGS)), None)
    vocabulary = vocabulary_size(folder)
    declared = config.get("vocab_size")
    if embedding is not None and isinstance(declared, int) and declared != embedding.shape[0]:
        raise ModelError(
            f"config.json says vocab_size {declared}, the embedding has {embedding.shape[0]} rows",
            where=str(folder),
            hint="one of the two was changed without the other",
        )
    if embedding is not None and vocabulary is not None and vocabulary > embedding.shape[0]:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens, the embedding only {embedding.shape[0]} rows",
            where=str(folder),
            hint="tokens were added without resizing the embedding; use the tokenizer that belongs to the weights",
        )
    return headers


def shape_facts(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """What `luthier.api.estimates.Shape` is made of, where the config has it."""
    text = {**config, **_mapping(config.get("text_config"))}
    sizes = [text.get(name) for name in ("hidden_size", "num_hidden_layers")]
    if not all(isinstance(size, int) for size in sizes):
        return {}
    inside = [header for name, header in headers.items() if BLOCK.search(name) and len(header.shape) > 1]
    whole = sum(math.prod(header.shape) for header in headers.values())
    inner: Any = text.get("intermediate_size") or 4 * int(cast("int", sizes[0]))
    return {
        "shape": {
            "width": sizes[0],
            "layers": sizes[1],
            "inner": max(cast("list[int]", inner)) if isinstance(inner, list) else inner,
            "sides": sum(math.prod(header.shape[:-2]) * sum(header.shape[-2:]) for header in inside),
            "outside": whole - sum(math.prod(header.shape) for header in inside),
        }
    }


def layer_names(headers: Mapping[str, TensorHeader]) -> list[str]:
    """The last parts of the names of layers with a matrix, such as ``q_proj``."""
    wide = [name for name, header in headers.items() if len(header.shape) > 1 and name.endswith(".weight")]
    return sorted({name.split(".")[-2] for name in wide if name.count(".") > 1})


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a config names, or else its type."""
    known: Any = config.get("architectures")
    named = cast("list[Any]", known) if isinstance(known, list) else []
    return str(named[0] if named else config.get("model_type"))


def model_facts(folder: Path) -> dict[str, Any]:
    """What a model artifact's manifest says of it, read from its headers.

    Raises:
        ModelError: see `check_model_folder`; or the config ties an output head of its own to the embedding.
    """
    headers = check_model_folder(folder)
    config = read_json(folder / "config.json")
    own = own_tensors(folder, config, headers)
    if config.get(TIES) is True and head_of(own) is not None:
        raise ModelError(
            f"config.json has the output head be the embedding ({TIES}), and the weights have a head of its own",
            where=str(folder),
            hint=f"write `{TIES}: false`",
        )
    template = chat_template(folder)
    sizes: dict[str, int] = {}
    for header in own.values():
        sizes[header.dtype] = sizes.get(header.dtype, 0) + math.prod(header.shape)
    quantized = _mapping(config.get("quantization_config"))
    return {
        **({"quantization": {"method": quantized.get("quant_method", "unknown")}} if quantized else {}),
        "architecture": architecture_of(config),
        "dtype": max(sizes, key=lambda dtype: sizes[dtype], default="F32"),
        "parameters": sum(sizes.values()),
        "tensors": len(own),
        **shape_facts(config, own),
        "vocab_size": config.get("vocab_size"),
        "layer_names": layer_names(own),
        "tokenizer": tokenizer_digest(folder),
        "chat_template": digest_value(template) if template is not None else None,
        "stop_tokens": stop_tokens(folder),
        "stop_token_ids": stop_token_ids(folder),
    }
