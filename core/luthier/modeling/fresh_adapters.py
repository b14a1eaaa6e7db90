"""Fresh adapters: put on a model, and begun as something else than no update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from luthier.api.errors import ModelError
from luthier.modeling.shards import tensors_of

INITIAL = "initial-adapter"
"""The folder in a stage's scratch with an adapter as it began, where that changed its base."""


def make_up_for_quantizing(model: Any, folder: Path) -> None:
    """Begin a low-rank adapter as what quantizing its base to 4 bits took away: the best approximation of its rank to
    the difference (Li et al. 2023, arXiv:2310.08659, algorithm 1, with the quantized base left as it is).

    Args:
        model: The quantized model with a fresh adapter.
        folder: The model as it was before it was quantized.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    for name, value in tensors_of(folder):
        if name not in layers:
            continue
        layer: Any = layers[name]
        weight = layer.get_base_layer().weight
        error = value.to(weight.device).float() - dequantize_4bit(weight.data, weight.quant_state).float()
        left, sizes, right = torch.linalg.svd(error, full_matrices=False)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        roots = sizes[:rank].sqrt()
        layer.lora_B["default"].weight.data = (left[:, :rank] * roots / scaling).contiguous()
        layer.lora_A["default"].weight.data = (roots[:, None] * right[:rank]).contiguous()


def token_ids(model: Any, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens of a model's vocabulary.

    Args:
        model: The model, loaded from a folder with its tokenizer.
        tokens: Their texts.

    Raises:
        ModelError: names those that are no tokens.
    """
    if not tokens:
        return []
    tokenizer: Any = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise ModelError(
            f"the vocabulary has no token {', '.join(map(repr, unknown))}",
            hint="add them to the tokenizer, and rows for them to the model, first",
        )
    return [vocabulary[token] for token in tokens]


def with_adapter(model: Any, config: Any) -> Any:
    """A model with a fresh adapter.

    Raises:
        ModelError: PEFT cannot put it there.
    """
    import peft

    try:
        return peft.get_peft_model(model, config)
    # PEFT knows of some architectures that its adapters do not go with.
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"PEFT cannot put the adapter on this model: {str(error).strip().partition(chr(10))[0]}",
            hint="name other layers under `target_modules`",
        ) from error
