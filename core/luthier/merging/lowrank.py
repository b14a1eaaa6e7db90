"""Adapters added to the weights they sit on, part by part: W + s B A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.artifacts.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import EMBEDDINGS, HEAD, TensorHeader, safetensors_header
from luthier.merging.files import DTYPES, Files, Scratch

WRAPPED = "base_model.model."
TRANSPOSED = ("gpt2", "imagegpt", "openai-gpt")
"""Architectures whose linear layers are Conv1D, with weights of shape (in, out)."""
ADDS_ONLY = ("gaussian", "orthogonal", "eva")
"""Initializations that leave the base unchanged; the others subtract the initial values from it."""
VARIANTS = ("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
            "monteclora_config", "layer_replication", "lora_bias")  # fmt: skip
"""Settings of PEFT with which an adapter is more than W + s B A."""
EMBEDDING_A = "embedding_A"
UNTIED = (HEAD, "embed_out.weight")
"""Output heads that are separate parameters, where they are among the tensors."""


@dataclass(frozen=True, slots=True)
class Target:
    """One weight's low-rank update.

    Attributes:
        a: The name of A, of shape (r, in), in the adapter's file.
        b: The name of B, of shape (out, r).
        scale: What to multiply B A with.
        magnitude: The name of DoRA's magnitudes.
        transposed: Whether the weight is stored as (in, out).
    """

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    transposed: bool = False


class LowRank:
    """A LoRA or DoRA adapter, added to the rows of its base's weights.

    Args:
        folder: The adapter's folder, as PEFT writes it.
        headers: The tensors of its base.
        config: The base's ``config.json``.

    Attributes:
        targets: The weights that get an update.
        replaced: The weights that the adapter brings whole, by their names in its file.

    Raises:
        Unfoldable: it does what only PEFT knows how to fold.
    """

    def __init__(self, folder: Path, headers: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> None:
        self.settings: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        self.headers = safetensors_header(folder / ADAPTER_WEIGHTS)
        self.targets: dict[str, Target] = {}
        self.replaced: dict[str, str] = {}
        if self.settings["peft_type"] != "LORA":
            raise Unfoldable(f"a {self.settings['peft_type']} adapter")
        begun = self.settings.get("init_lora_weights", True)
        if isinstance(begun, str) and begun not in ADDS_ONLY:
            raise Unfoldable(f"weights that begin by {begun}, which changes the base as well")
        odd = [name for name in VARIANTS if self.settings.get(name)]
        if odd:
            raise Unfoldable(f"the setting {odd[0]}")
        for name in self.headers:
            self._sort_in(name, headers, str(config.get("model_type")))
        tied = not any(name.endswith(UNTIED) for name in headers)
        shared = [name for name in (*self.targets, *self.replaced) if tied and name.endswith(EMBEDDINGS)]
        if shared:
            raise Unfoldable(f"a change to {shared[0]}, which is the output head too")
        self.files = Files(folder, self.headers)
        self.factors = lru_cache(maxsize=8)(self._factors)

    @property
    def beyond(self) -> str:
        """What it changes besides linear layers, for messages; empty when nothing."""
        embeddings = [name for name, target in self.targets.items() if target.a.endswith(EMBEDDING_A)]
        return next(iter([*self.replaced, *embeddings]), "")

    def module(self, weight: str) -> str:
        """The name of the module that a target is the weight of, as PEFT has it."""
        return self.targets[weight].a.removeprefix(WRAPPED).partition(".lora_")[0]

    def close(self) -> None:
        """Close the adapter's file."""
        self.files.close()

    def _sort_in(self, name: str, headers: Mapping[str, TensorHeader], architecture: str) -> None:
        """Find out what one tensor of the adapter is for."""
        module, _, rest = name.partition(".lora_")
        weight = in_file(f"{module.removeprefix(WRAPPED)}.weight", headers)
        if rest == "A.weight" and len(_shape(weight, headers)) == 2:
            partner, magnitude = f"{module}.lora_B.weight", f"{module}.lora_magnitude_vector"
            inside, outside = self.headers[name].shape[1], self.headers[partner].shape[0]
            turned = architecture in TRANSPOSED if inside == outside else _shape(weight, headers) == (inside, outside)
            has_magnitude = magnitude in self.headers
            if turned and has_magnitude:
                raise Unfoldable(f"DoRA on {weight}, which is stored transposed")
            self.targets[weight] = Target(
                name,
                partner,
                self._scale(weight, self.headers[name].shape[0]),
                magnitude if has_magnitude else None,
                turned,
            )
        elif rest == EMBEDDING_A and weight in headers and f"{module}.lora_magnitude_vector" not in self.headers:
            # (r, tokens): the embedding is a linear layer from tokens, stored transposed.
            r = self.headers[name].shape[0]
            self.targets[weight] = Target(name, f"{module}.lora_embedding_B", self._scale(weight, r), transposed=True)
        elif not rest and self._replaces(name, headers):
            self.replaced[_plain(name, headers)] = name
        elif rest not in ("B.weight", "embedding_B", "magnitude_vector"):
            raise Unfoldable(f"the tensor {name}")

    def _replaces(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        plain, header = _plain(name, headers), self.headers[name]
        return plain in headers and headers[plain].shape == header.shape and header.dtype in DTYPES

    def _scale(self, weight: str, r: int) -> float:
        module = weight.removesuffix(".weight")
        alphas: dict[str, float] = self.settings.get("alpha_pattern") or {}
        # PEFT's keys are regular expressions for the end of a module's name; the first that fits counts.
        alpha = next(
            (value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)),
            self.settings["lora_alpha"],
        )
        return alpha / (math.sqrt(r) if self.settings.get("use_rslora") else r)

    def _factors(self, weight: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """B * scale, A and, for DoRA, the magnitudes."""
        target = self.targets[weight]
        magnitude = None if target.magnitude is None else self.files.whole(target.magnitude).flatten()
        return self.files.whole(target.b) * target.scale, self.files.whole(target.a), magnitude

    def changes(self, weight: str) -> bool:
        """Whether the weight is another than the base's."""
        return weight in self.targets or weight in self.replaced

    def read(self, weight: str, start: int, out: Tensor, scratch: Scratch) -> bool:
        """Fill `out` with what replaces the base's weight, if the adapter brings it whole."""
        if weight not in self.replaced:
            return False
        self.files.floats(self.replaced[weight], start, out.view(-1), scratch)
        return True

    def add(self, weight: str, first: int, rows: Tensor) -> None:
        """Add the update to `rows`, the weight's rows from the row `first` on, in place.

        DoRA gives each row the length it has learned (Liu et al. 2024, arXiv:2402.09353, equation 5).
        """
        if weight not in self.targets:
            return
        b, a, magnitude = self.factors(weight)
        behind = first + rows.shape[0]
        if self.targets[weight].transposed:
            rows.addmm_(a.T[first:behind], b.T)
            return
        rows.addmm_(b[first:behind], a)
        if magnitude is not None:
            lengths = rows.norm(dim=1)
            rows.mul_((magnitude[first:behind] / lengths)[:, None])


class Unfoldable(Exception):
    """An adapter that is more than updates and whole tensors."""


def in_file(name: str, headers: Mapping[str, TensorHeader]) -> str:
    """What a parameter is called in a file: some leave out the name of the model inside the model."""
    short = name.partition(".")[2]
    return short if name not in headers and short in headers else name


def _plain(name: str, headers: Mapping[str, TensorHeader]) -> str:
    return in_file(name.removeprefix(WRAPPED).replace(".base_layer.", "."), headers)


def _shape(weight: str, headers: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    return headers[weight].shape if weight in headers else ()
