"""Any merge method that is registered with mergekit."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from luthier.api import ModelError
from luthier_plugins.merge_methods.config import MergekitConfig
from torch import Tensor


class Mergekit:
    """Hands each parameter to mergekit's own method, third-party ones included; reading and writing stay ours.

    The models' weights go along as mergekit's parameter ``weight`` where the method has one. `needs_base` is what
    the method's contract says.
    """

    # Every instance says it anew, for its method.
    needs_base: bool = False

    def __init__(self, config: MergekitConfig) -> None:
        library: Any = import_module("mergekit.merge_methods")
        self._merge_tensors: Any = library.merge_tensors
        self._method = _method(library, config.name)
        self.needs_base = self._method.spec.contract.base.value == "required"
        known = {parameter.name for parameter in self._method.spec.parameters}
        odd = sorted(set(config.parameters) - known)
        if odd:
            has = ", ".join(sorted(known)) or "none"
            raise ModelError(f"mergekit's {config.name} has no parameter '{odd[0]}'", hint=f"it has: {has}")
        self._takes_weights = "weight" in known and "weight" not in config.parameters
        self.config = config
        self._calls = 0

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        models = {f"model-{place}": tensor for place, tensor in enumerate(tensors)}
        inputs = {"base": base, **models} if base is not None else models
        parameters = dict(self.config.parameters)
        if self._takes_weights:
            parameters["weight"] = dict(zip(models, weights, strict=True))
        self._calls += 1
        # Methods with random masks draw from torch's global generator: leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + self._calls)
            merged: Tensor = self._merge_tensors(
                [tensor.clone() for tensor in inputs.values()],
                self._method,
                parameters=parameters,
                ids=list(inputs),
                base_index=0 if base is not None else None,
            )
        return merged


def _method(library: Any, name: str) -> Any:
    known: dict[str, Any] = {method.spec.name: method for method in library.registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(sorted(known))}"
        raise ModelError(f"mergekit has no method '{name}'", hint=hint)
    return known[name]
