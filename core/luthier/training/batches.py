"""What a model makes of a batch: ragged log-probabilities of what is trained."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from luthier.api.training import CompletionBatch, TokenBatch
from luthier.training.head import Scaling, target_log_probabilities
from luthier.training.segments import around

DRAWS = re.compile(r"dropout|jitter")
"""What attributes of modules are called that hold a chance, or the size of a noise."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model makes of a batch.

    Attributes:
        completions: The log-probabilities.
        likeliest: Whether the target was the likeliest token, shape (targets,).
        auxiliary: What the model adds to the loss itself, such as the balance of its experts: a scalar, or None.
    """

    completions: CompletionBatch
    likeliest: Tensor
    auxiliary: Tensor | None


def log_probabilities(model: Any, batch: TokenBatch, *, fused: bool = True, alike: bool = False) -> Outputs:
    """Run a model on a batch.

    Args:
        model: The model.
        batch: The batch, on its device.
        fused: Whether the output head is applied to trained positions alone; else the model's own logits are taken.
        alike: See `luthier.training.head.target_log_probabilities`.
    """
    with around(batch):
        logps, likeliest, auxiliary = _fused(model, batch, alike) if fused else _plain(model, batch)
    made = CompletionBatch(
        logps=logps,
        owner=batch.owner,
        sums=_by_completion(logps, batch),
        lengths=torch.bincount(batch.owner, minlength=batch.completions),
        reference_logps=batch.reference_logps,
        reference_sums=None if batch.reference_logps is None else _by_completion(batch.reference_logps, batch),
        pairs=batch.pairs,
        desirable=batch.desirable,
        weights=batch.weights,
    )
    return Outputs(made, likeliest, auxiliary)


def _by_completion(values: Tensor, batch: TokenBatch) -> Tensor:
    return values.new_zeros(batch.completions).index_add(0, batch.owner, values)


def backbone_of(model: Any) -> tuple[Any, Any]:
    """A causal language model without its output head, and the head."""
    inside: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inside.base_model, inside.get_output_embeddings()


def _fused(model: Any, batch: TokenBatch, alike: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    backbone, head = backbone_of(model)
    balanced = _balances_experts(model)
    output = backbone(**batch.model_inputs(), use_cache=False, **({"output_router_logits": True} if balanced else {}))
    hidden = output.last_hidden_state.flatten(0, 1)[batch.sources]
    logps, likeliest = target_log_probabilities(head, hidden, batch.targets, Scaling.of(model.config), alike=alike)
    return logps, likeliest, _balance(model, output.router_logits, batch) if balanced else None


def _plain(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    inputs = batch.model_inputs()
    if _balances_experts(model) and batch.position_ids is None:
        # The balance of experts is that of tokens, without padding.
        inputs["attention_mask"] = batch.attention_mask
    output = model(**inputs, use_cache=False)
    logits = output.logits.flatten(0, 1)[batch.sources].float()
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    auxiliary: Any = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor) or not _balances_experts(model):
        auxiliary = None
    else:
        auxiliary = _coefficient(model) * auxiliary
    return logps, logits.argmax(-1) == batch.targets, auxiliary


def _balances_experts(model: Any) -> bool:
    """Whether the model's config asks for the loss that balances its experts."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _coefficient(model: Any) -> float:
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)


def _balance(model: Any, router_logits: Any, batch: TokenBatch) -> Tensor:
    """The loss that balances experts, as the model's own module defines it, over tokens without padding."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    function: Any = sys.modules[type(inside).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    return _coefficient(model) * function(
        router_logits, inside.num_experts, inside.num_experts_per_tok, batch.attention_mask
    )


def draws(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float]]:
    """What a model draws random numbers for while it is trained: dropout, also where attention takes it as a number,
    and noise of routers. Each as a module, the name of the attribute, and its value."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value > 0
        and (DRAWS.search(name) or (name == "p" and isinstance(module, torch.nn.Dropout)))
    ]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without anything random, for as long as it is entered."""
    training = model.training
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        # bitsandbytes takes evaluation as a sign to repack its weights for another kernel, which rounds otherwise.
        model.train()
        found = draws(model)
        for module, name, _ in found:
            setattr(module, name, 0.0)
    else:
        found = []
        model.eval()
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
        model.train(training)
