"""Any merge method that is registered with mergekit."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any, ClassVar

import torch
from luthier.api import Granularity, MergePart, ModelError, ModelSetting, PerModel
from luthier_plugins.merge_methods.config import MergekitConfig
from pydantic import TypeAdapter, ValidationError
from torch import Tensor


class Mergekit:
    """Hands each parameter to mergekit's own method, third-party ones included; reading and writing stay ours.

    The models' weights go along as mergekit's parameter ``weight`` where the method has one.
    """

    granularity: ClassVar[Granularity] = "matrix"

    def __init__(self, config: MergekitConfig) -> None:
        library: Any = import_module("mergekit.merge_methods")
        self._merge_tensors: Any = library.merge_tensors
        self._method = _method(library, config.name)
        self._base: str = self._method.spec.contract.base.value
        known = {parameter.name: parameter.scope.value for parameter in self._method.spec.parameters}
        odd = sorted(set(config.parameters) - set(known))
        if odd:
            has = ", ".join(sorted(known)) or "none"
            raise ModelError(f"mergekit's {config.name} has no parameter '{odd[0]}'", hint=f"it has: {has}")
        self._takes_weights = "weight" in known and "weight" not in config.parameters
        self._weighs_base = known.get("weight") == "input"
        self._settings = {name: _setting(value) for name, value in config.parameters.items()}
        self.config = config

    def merge(self, part: MergePart) -> Tensor:
        models = [f"model-{place}" for place in range(len(part.tensors))]
        if self._base == "required" and part.base is None:
            raise ModelError(f"mergekit's {self.config.name} needs a base", hint="name the models' ancestor as `base`")
        uses_base = part.base is not None and self._base != "ignored"
        tensors = [*([part.base] if uses_base else []), *part.tensors]
        ids = [*(["base"] if uses_base else []), *models]
        parameters = {name: self._value(part, setting, models) for name, setting in self._settings.items()}
        if self._takes_weights:
            weights = dict(zip(models, part.weights, strict=True))
            parameters["weight"] = {"base": 1.0, **weights} if self._weighs_base and uses_base else weights
        # Methods with random masks draw from torch's global generator, of which every thread has its own: leave
        # it as it was, and let nothing but the recipe, the models and the parameter decide.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + int(part.uniform(0).flatten()[0] * 2**24))
            merged: Tensor = self._merge_tensors(
                [tensor.clone() for tensor in tensors if tensor is not None],
                self._method,
                parameters=parameters,
                ids=ids,
                base_index=0 if uses_base else None,
            )
        return merged

    @staticmethod
    def _value(part: MergePart, setting: Any, models: list[str]) -> Any:
        if isinstance(setting, PerModel):
            return dict(zip(models, part.place.values(setting), strict=True))
        return part.place.value(setting) if isinstance(setting, (int, float, list)) else setting


def _setting(value: Any) -> Any:
    """A number, list or mapping as a setting; words and switches as they are."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    try:
        return TypeAdapter(ModelSetting).validate_python(value)
    except ValidationError as error:
        raise ModelError(f"{value!r} is no number, no list of numbers and no list of filters") from error


def _method(library: Any, name: str) -> Any:
    known: dict[str, Any] = {method.spec.name: method for method in library.registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(sorted(known))}"
        raise ModelError(f"mergekit has no method '{name}'", hint=hint)
    return known[name]
