"""Any merge method that is registered with mergekit."""

from __future__ import annotations

import difflib
import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from luthier.api import Context, ModelError
from luthier.merging.api import Granularity, MergeMethod, MergePart, ModelSetting, PerModel
from luthier_plugins.merge_methods.config import MergekitConfig
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

WITHOUT_CHANCE = ("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "breadcrumbs",
                  "breadcrumbs_ties", "model_stock", "sce", "nearswap", "ram", "ramplus_tl", "passthrough")  # fmt: skip
"""Methods of mergekit that draw no random numbers, so that several parameters may be merged at a time."""

DRAWN = 16
"""Numbers of each model that make the seed for a parameter."""


class Mergekit(MergeMethod[MergekitConfig]):
    """Hands each parameter to mergekit's own method, third-party ones included; reading and writing stay ours.

    The models' weights go along as mergekit's parameter ``weight`` where the method has one.
    """

    granularity: Granularity = "matrix"

    def __init__(self, config: MergekitConfig, context: Context) -> None:
        super().__init__(config, context)
        library: Any = import_module("mergekit.merge_methods")
        if config.module is not None:
            try:
                import_module(config.module)
            except ImportError as error:
                raise ModelError(
                    f"the module {config.module} cannot be imported: {error}",
                    hint="install it where Luthier is installed",
                ) from error
        self._merge_tensors: Any = library.merge_tensors
        self._method = _method(library, config.name)
        self._base: str = self._method.spec.contract.base.value
        self.needs_base = self._base == "required"
        known = {parameter.name: parameter.scope.value for parameter in self._method.spec.parameters}
        odd = sorted(set(config.parameters) - set(known))
        if odd:
            has = ", ".join(sorted(known)) or "none"
            raise ModelError(f"mergekit's {config.name} has no parameter '{odd[0]}'", hint=f"it has: {has}")
        self._takes_weights = "weight" in known and "weight" not in config.parameters
        self._weighs_base = known.get("weight") == "input"
        self._settings = {name: _setting(value) for name, value in config.parameters.items()}
        self.config = config
        # A GPU would draw other masks than a CPU.
        self.suits_gpu = config.name in WITHOUT_CHANCE
        self._lock = threading.Lock()

    def merge(self, part: MergePart) -> Tensor:
        models = [f"model-{place}" for place in range(len(part.tensors))]
        if self.needs_base and part.base is None:
            raise ModelError(f"mergekit's {self.config.name} needs a base", hint="name the models' ancestor as `base`")
        if self._base == "ignored" and part.base is not None:
            raise ModelError(f"mergekit's {self.config.name} does not use a base", hint="leave `base` out")
        uses_base = part.base is not None
        tensors = [*([part.base] if uses_base else []), *part.tensors]
        ids = [*(["base"] if uses_base else []), *models]
        parameters = {name: self._value(part, setting, models) for name, setting in self._settings.items()}
        if self._takes_weights:
            weights = dict(zip(models, part.weights, strict=True))
            parameters["weight"] = {"base": 1.0, **weights} if self._weighs_base and uses_base else weights
        given = [tensor.clone() for tensor in tensors if tensor is not None]
        with self._seeded(part):
            merged: Tensor = self._merge_tensors(
                given, self._method, parameters=parameters, ids=ids, base_index=0 if uses_base else None
            )
        return merged

    @contextmanager
    def _seeded(self, part: MergePart) -> Generator[None]:
        """Let nothing but the recipe, the models and the parameter decide about random masks.

        They are drawn from torch's generator, which all threads share: one parameter at a time, and it is left as it
        was.
        """
        if self.config.name in WITHOUT_CHANCE:
            yield
            return
        assert part.draw is not None, "the engine gives every part its random numbers"
        drawn = [part.draw(model, 0, DRAWN).numpy().tobytes() for model in range(len(part.tensors))]
        seed = int.from_bytes(hashlib.sha256(b"".join(drawn)).digest()[:6])
        with self._lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + seed)
            yield

    @staticmethod
    def _value(part: MergePart, setting: Any, models: list[str]) -> Any:
        if isinstance(setting, PerModel):
            return dict(zip(models, part.parameter.values(setting), strict=True))
        return part.parameter.value(setting) if isinstance(setting, (int, float, list)) else setting


def _setting(value: Any) -> Any:
    """A number, list or mapping as a setting; words and switches as they are."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    try:
        return TypeAdapter(ModelSetting).validate_python(value)
    except ValidationError as error:
        raise ModelError(f"{value!r} is not a number, a list of numbers or a list of filters") from error


def _method(library: Any, name: str) -> Any:
    known: dict[str, Any] = {method.spec.name: method for method in library.registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(sorted(known))}"
        raise ModelError(f"mergekit has no method '{name}'", hint=hint)
    return known[name]
