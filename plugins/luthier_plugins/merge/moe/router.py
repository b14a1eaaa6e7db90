"""Routers that know what the experts are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from luthier.api import Artifact
from torch import Tensor, nn


def from_prompts(base: Artifact, prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """For each layer a router whose rows point to where the base's states are on the experts' prompts.

    A row is the mean state in front of the layer's feed-forward part over all tokens of the expert's prompts, minus
    the mean over all experts (what every prompt has in common carries no information), with the length 1.

    Args:
        base: The model.
        prompts: The texts of each expert.

    Returns:
        For each layer float32, shape (experts, hidden).
    """
    from luthier.modeling.loading import fold, load_model, load_tokenizer
    from luthier.modeling.text import encode_text

    tokenizer = load_tokenizer(base)
    model: Any = fold(load_model(base)).eval()
    layers: list[nn.Module] = list(model.get_decoder().layers)
    states: list[list[Tensor]] = [[] for _ in layers]

    def watch(layer: int, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            states[layer].append(output.detach()[0])

        module.register_forward_hook(hook)

    for number, layer in enumerate(layers):
        watch(number, layer.get_submodule("post_attention_layernorm"))
    means: list[list[Tensor]] = [[] for _ in layers]
    for texts in prompts:
        for text in texts:
            with torch.no_grad():
                model(input_ids=torch.tensor([encode_text(tokenizer, text).input_ids]))
        for number, found in enumerate(states):
            means[number].append(torch.cat(found).mean(dim=0))
            found.clear()
    return [_directions(torch.stack(rows)) for rows in means]


def _directions(rows: Tensor) -> Tensor:
    apart = rows - rows.mean(dim=0, keepdim=True)
    return apart / apart.norm(dim=1, keepdim=True).clamp(min=1e-12)
