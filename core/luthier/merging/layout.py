"""What the merged model is made of: its tensors, where each comes from, and its config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.merging.api import MergedParameter
from luthier.merging.config import MergeConfig, SliceSource
from luthier.merging.files import DTYPES
from luthier.merging.jobs import Operand, TensorJob
from luthier.merging.parts import Noise
from luthier.merging.reader import Source
from luthier.merging.stacking import kinds_by, restacked
from luthier.merging.writer import Described

LAYER = re.compile(r"^(?P<head>.*?\b(?:layers|h|blocks|block)\.)(?P<number>\d+)(?P<tail>\..*)$")
EMBEDS = ("embed", "wte", "wpe")
OUT = "embed_out."
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The merged model before a tensor is read.

    Attributes:
        tensors: All tensors, in order.
        jobs: How each is made.
        config: Its ``config.json``.
        copied: The tensors that are not merged but copied from the base, such as whole-number buffers.
    """

    tensors: dict[str, Described]
    jobs: list[TensorJob]
    config: dict[str, Any]
    copied: list[str]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The models of a merge, opened.

    Attributes:
        models: Those that are merged.
        base: Their common ancestor.
        own_bases: That of some slices, by their place, where it is another.
    """

    models: Sequence[Source]
    base: Source | None
    own_bases: Mapping[int, Source] = field(default_factory=dict[int, Source])

    def base_of(self, slice: int | None) -> Source | None:
        """The common ancestor of what is merged in a slice."""
        return self.base if slice is None else self.own_bases.get(slice, self.base)

    @property
    def all(self) -> list[Source]:
        """Every model once, the base first."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.models, *self.own_bases.values()]))

    @property
    def lead(self) -> Source:
        """The model that config, template and dtype are taken from."""
        return self.base or self.models[0]


def layers_of(names: Sequence[str]) -> dict[str, int]:
    """How many layers there are below each prefix."""
    counts: dict[str, int] = {}
    for name in names:
        match = LAYER.match(name)
        if match:
            counts[match["head"]] = max(counts.get(match["head"], 0), int(match["number"]) + 1)
    return counts


def depth_of(name: str, counts: Mapping[str, int]) -> float:
    """0 for the first layer, 1 for the last; 0 outside layers."""
    match = LAYER.match(name)
    if match is None:
        return 0.0
    count = counts[match["head"]]
    return int(match["number"]) / (count - 1) if count > 1 else 1.0


def _before_layers(name: str) -> bool:
    """Whether a parameter outside layers is used before them: all that embeds; what comes after them is a norm or the
    output head, which is called an embedding in GPT-NeoX.
    """
    return any(part in name for part in EMBEDS) and not name.startswith(OUT)


def lay_out(config: MergeConfig, inputs: Inputs, seed: int, dtype: str | None) -> Layout:
    """Plan every tensor of the merged model."""
    maker = _Maker(inputs, seed, dtype)
    if config.slices:
        return maker.stacked(config)
    weights = config.weights or [1.0] * len(inputs.models)
    return maker.plain(weights)


class _Maker:
    def __init__(self, inputs: Inputs, seed: int, dtype: str | None) -> None:
        self.inputs = inputs
        self.seed = seed
        self.dtype = NAMES[dtype] if dtype else None
        self.tensors: dict[str, Described] = {}
        self.jobs: list[TensorJob] = []
        self.copied: list[str] = []

    def plain(self, weights: Sequence[Any]) -> Layout:
        lead = self.inputs.lead
        counts = layers_of(list(lead.headers))
        for name in lead.headers:
            self._add(name, [Operand(model, name) for model in self.inputs.models], weights, depth_of(name, counts))
        return self._layout(dict(lead.config))

    def stacked(self, config: MergeConfig) -> Layout:
        """Slice after slice; what is in no layer comes from the first slice when it is an embedding, else the last."""
        placed = iter(self.inputs.models)
        slices = [[(next(placed), source) for source in part.sources] for part in config.slices]
        lead = self.inputs.lead
        heads = layers_of(list(lead.headers))
        assert heads, "checked: a model without layers has no slices"
        head = max(heads, key=lambda key: heads[key])
        outside = [name for name in lead.headers if LAYER.match(name) is None]
        order = {
            "first": [name for name in outside if _before_layers(name)],
            "last": [name for name in outside if not _before_layers(name)],
        }
        for name in order["first"]:
            self._outside(name, slices[0], 0)
        number = 0
        kinds = kinds_by(self.inputs.all)
        layers: list[dict[str, Any]] = []
        for place, part in enumerate(slices):
            count = part[0][1].layers[1] - part[0][1].layers[0]
            for step in range(count):
                depth = step / (count - 1) if count > 1 else 1.0
                base_layer = config.slices[place].of_base[0] + step
                self._layer(head, number, step, part, depth, place, base_layer)
                layers.append(kinds(part[0][0]).at(part[0][1].layers[0] + step))
                number += 1
        for name in order["last"]:
            self._outside(name, slices[-1], len(slices) - 1)
        return self._layout(restacked(lead.config, layers, kinds(lead)))

    def _outside(self, name: str, part: Sequence[tuple[Source, SliceSource]], place: int) -> None:
        operands = [self._operand(model, name, source, 0.0) for model, source in part]
        self._add(name, operands, [source.weight for _, source in part], 0.0, slice=place)

    @staticmethod
    def _operand(model: Source, name: str, source: SliceSource, depth: float) -> Operand:
        """A source's part in a parameter of the merged model, scaled as the slice says."""
        return Operand(model, name, MergedParameter(name, (), depth).value(source.scale))

    def _layer(
        self,
        head: str,
        number: int,
        step: int,
        part: Sequence[tuple[Source, SliceSource]],
        depth: float,
        place: int,
        base_layer: int,
    ) -> None:
        first = part[0][1].layers[0] + step
        start = f"{head}{first}."
        tails = [name[len(start) - 1 :] for name in part[0][0].headers if name.startswith(start)]
        for tail in tails:
            target = f"{head}{number}{tail}"
            operands = [
                self._operand(model, f"{head}{source.layers[0] + step}{tail}", source, depth) for model, source in part
            ]
            base = f"{head}{base_layer if self.inputs.base_of(place) else first}{tail}"
            self._add(target, operands, [source.weight for _, source in part], depth, base, slice=place)

    def _add(
        self,
        name: str,
        operands: Sequence[Operand],
        weights: Sequence[Any],
        depth: float,
        base_name: str | None = None,
        slice: int | None = None,
    ) -> None:
        ancestor = self.inputs.base_of(slice)
        origin, origin_name = ancestor or self.inputs.lead, base_name or name
        header = origin.headers.get(origin_name) or operands[0].weights.headers[operands[0].name]
        shape = header.shape
        if header.dtype not in DTYPES:
            source = Operand(origin, origin_name) if origin_name in origin.headers else operands[0]
            self.tensors[name] = Described(header.dtype, shape)
            self.jobs.append(TensorJob(MergedParameter(name, shape), [source], copied=True, slice=slice))
            self.copied.append(name)
            return
        parameter = MergedParameter(name, shape, depth, len(operands), tuple(operand.name for operand in operands))
        numbers = [parameter.value(weight, model) for model, weight in enumerate(weights)]
        base = Operand(ancestor, origin_name) if ancestor else None
        noise = Noise(self.seed, [operand.weights.content for operand in operands], name)
        stored = self.dtype or self.inputs.lead.headers.get(origin_name, header).dtype
        self.tensors[name] = Described(stored, shape)
        self.jobs.append(TensorJob(parameter, operands, base, numbers, noise, slice=slice))

    def _layout(self, config: dict[str, Any]) -> Layout:
        if self.dtype is not None:
            long = next(key for key, value in NAMES.items() if value == self.dtype)
            config = {**config, **{key: long for key in ("dtype", "torch_dtype") if key in config}}
        return Layout(self.tensors, self.jobs, config, self.copied)
