"""How far weights have moved from where they began: of a low-rank adapter, the weights that it stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"


class Weight(Protocol):
    """A weight that is trained, by itself or through an adapter."""

    def delta(self) -> Tensor:
        """What was added to it so far, in its shape."""
        ...

    def squared(self) -> Tensor:
        """The sum of the squares of `delta`: a scalar."""
        ...


class Plain:
    """A parameter that is trained itself."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._before = parameter.detach().clone()

    def delta(self) -> Tensor:
        return self.parameter - self._before

    def squared(self) -> Tensor:
        return self.delta().square().sum()


class LowRank:
    """A linear layer's weight under a low-rank adapter: what counts is the product, not its factors.

    Args:
        layer: The layer, with the adapter named ``default``.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        down, up = self._factors()
        self._before = (down.detach().clone(), up.detach().clone()) if bool(up.any()) else None

    def fingerprint(self) -> str:
        """Identifies what it adds to the weight as it begins; the same for all that add nothing."""
        if self._before is None:
            return ""
        whole = hashlib.sha256()
        for factor in self._before:
            whole.update(factor.float().cpu().numpy().tobytes())
        return whole.hexdigest()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A, shape (r, inputs), and B, shape (outputs, r)."""
        return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight

    def _difference(self) -> tuple[Tensor, Tensor]:
        """Factors of B A - B0 A0: shapes (2 r, inputs) and (outputs, 2 r), or without the 2 where B0 is 0."""
        down, up = self._factors()
        if self._before is None:
            return down, up
        return torch.cat([down, self._before[0]]), torch.cat([up, -self._before[1]], 1)

    def delta(self) -> Tensor:
        down, up = self._difference()
        return self.layer.scaling[ADAPTER] * (up @ down)

    def squared(self) -> Tensor:
        # |B A|^2 is the sum of (B^T B) * (A A^T): the product itself is never made.
        down, up = self._difference()
        return self.layer.scaling[ADAPTER] ** 2 * ((up.T @ up) * (down @ down.T)).sum()


def weights_of(model: nn.Module) -> dict[str, Plain | LowRank]:
    """The weights that are trained, by their names, as they are now."""
    found: dict[str, Plain | LowRank] = {}
    factors: set[int] = set()
    for name, layer in lora_layers(model):
        found[f"{name}.weight"] = LowRank(layer)
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            factors.add(id(part.weight))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            found[name] = Plain(parameter)
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers with a trained low-rank adapter."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        halves: Mapping[str, Any] = module.lora_A  # type: ignore[assignment]
        if ADAPTER in halves and isinstance(halves[ADAPTER], nn.Linear) and halves[ADAPTER].weight.requires_grad:
            base: Any = module.get_base_layer()
            if isinstance(base, nn.Linear):
                yield name, module
