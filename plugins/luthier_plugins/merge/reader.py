"""Reads parts of tensors from model folders as float32, an adapter added on the way."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from luthier.api import Artifact, ModelError
from luthier.artifacts.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from luthier.artifacts.models import TensorHeader, read_json, safetensors_header, tensor_headers
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
WRAPPED = "base_model.model."


def bytes_of(raw: Tensor) -> memoryview:
    """A uint8 tensor's memory."""
    array: Any = raw.numpy()
    return memoryview(array)


class Scratch:
    """One worker's buffers, used again for every part."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._raw = torch.empty(0, dtype=torch.uint8)

    def floats(self, place: int, count: int) -> Tensor:
        """A float32 buffer of `count` entries; what was in it at this place is lost."""
        if place not in self._buffers or self._buffers[place].numel() < count:
            self._buffers[place] = torch.empty(count)
        return self._buffers[place][:count]

    def raw(self, count: int) -> Tensor:
        """A buffer of `count` bytes; what was in it is lost."""
        if self._raw.numel() < count:
            self._raw = torch.empty(count, dtype=torch.uint8)
        return self._raw[:count]


class Files:
    """The safetensors files of one folder, opened once and read by place: threads do not disturb each other."""

    def __init__(self, folder: Path, headers: Mapping[str, TensorHeader]) -> None:
        self.folder = folder
        self.headers = dict(headers)
        self._open: dict[str, int] = {}
        for name in sorted({header.file for header in headers.values()}):
            self._open[name] = os.open(folder / name, os.O_RDONLY)

    def close(self) -> None:
        """Close the files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def raw(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, uint8, with the tensor's bytes from the byte `first` on."""
        header = self.headers[name]
        if first + out.numel() > math.prod(header.shape) * SIZES[header.dtype]:
            raise ModelError("is shorter than what is read of it", where=f"{self.folder / header.file}: {name}")
        view = bytes_of(out)
        place = header.start + first
        while view:
            got = os.preadv(self._open[header.file], [view], place)
            if got == 0:
                raise ModelError("ends before the tensor does", where=f"{self.folder / header.file}: {name}")
            place += got
            view = view[got:]

    def floats(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out`, float32, with the tensor's entries from `start` on."""
        header = self.headers[name]
        dtype = DTYPES[header.dtype]
        size = SIZES[header.dtype]
        if dtype == torch.float32:
            self.raw(name, start * size, out.view(torch.uint8))
            return
        raw = scratch.raw(out.numel() * size)
        self.raw(name, start * size, raw)
        out.copy_(raw.view(dtype))

    def whole(self, name: str) -> Tensor:
        """A whole tensor as float32, in its own shape."""
        out = torch.empty(math.prod(self.headers[name].shape))
        self.floats(name, 0, out, Scratch())
        return out.view(self.headers[name].shape)


class Source(Protocol):
    """A model whose tensors can be read in parts.

    Attributes:
        artifact: The model or adapter.
        label: The stage it came from, for messages.
        content: What tells its content apart from that of other models.
        headers: Its tensors.
        config: Its ``config.json``.
    """

    artifact: Artifact
    label: str
    content: str
    headers: dict[str, TensorHeader]
    config: dict[str, Any]

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out`, float32 of shape (rows, columns), with whole rows of a tensor from the entry `start` on.

        Raises:
            ModelError: an entry is NaN or infinite.
        """
        ...

    def raw(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, uint8, with the tensor's bytes from the byte `first` on."""
        ...


class Weights:
    """The weights of a model, or of an adapter on its base: W + s B A, computed part by part."""

    def __init__(self, artifact: Artifact) -> None:
        full = artifact.base if artifact.kind == "adapter" else artifact
        self.artifact = artifact
        self.label = label_of(artifact)
        self.content = content_of(artifact)
        self.headers = tensor_headers(full.path)
        self.config = read_json(full.path / "config.json")
        self.adapter = LowRank(artifact.path, self.headers) if artifact.kind == "adapter" else None
        self.files = Files(full.path, self.headers)

    def close(self) -> None:
        """Close the files."""
        self.files.close()
        if self.adapter is not None:
            self.adapter.files.close()

    def where(self, name: str) -> str:
        """A tensor's place, for messages."""
        return f"{self.files.folder / self.headers[name].file} ({self.label}): {name}"

    def raw(self, name: str, first: int, out: Tensor) -> None:
        self.files.raw(name, first, out)

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        self.files.floats(name, start, out.view(-1), scratch)
        if self.adapter is not None and name in self.adapter.targets:
            self.adapter.add(name, start // out.shape[1], out)
        # The sum is finite unless an entry is not, or the sum itself overflows: look closer then.
        if not math.isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
            raise ModelError("the tensor has NaN or infinite values", where=self.where(name),
                             hint="train again with a lower learning rate, or take an earlier checkpoint")  # fmt: skip


def whole(source: Source, name: str) -> Tensor:
    """A whole tensor as float32, in its own shape."""
    shape = source.headers[name].shape
    out = torch.empty(shape)
    if out.numel():
        source.read(name, 0, out.view(-1, shape[-1] if shape else 1), Scratch())
    return out


def label_of(artifact: Artifact) -> str:
    """What to call a model: its stage, or the folder that it was read from."""
    stage = str(artifact.manifest.get("stage", artifact.path.name))
    _, opened, inside = stage.partition("(")
    return Path(inside.rstrip(")")).name if opened else stage


def content_of(artifact: Artifact) -> str:
    """A text that is the same for the same weights, wherever they are and whatever they are called."""
    files: Mapping[str, Any] = artifact.manifest.get("files", {})
    digests = sorted(about["sha256"] for name, about in files.items() if name.endswith(".safetensors"))
    return "\n".join([*digests, artifact.facts["base"]] if artifact.kind == "adapter" else digests) or artifact.key


@dataclass(frozen=True, slots=True)
class _Target:
    """One weight's low-rank update: names in the adapter's file, and what to multiply B A with."""

    a: str
    b: str
    scale: float
    magnitude: str | None


class LowRank:
    """A LoRA or DoRA adapter on linear layers, added to the rows of its base's weights.

    Args:
        folder: The adapter's folder, as PEFT writes it.
        headers: The tensors of its base.

    Raises:
        Unfoldable: it changes something else than the weights of linear layers; PEFT has to fold it.
    """

    def __init__(self, folder: Path, headers: Mapping[str, TensorHeader]) -> None:
        path = folder / ADAPTER_WEIGHTS
        self.settings: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        self.headers = safetensors_header(path)
        self.targets = self._targets(headers)
        self.files = Files(folder, self.headers)
        self.factors = lru_cache(maxsize=8)(self._factors)

    def _targets(self, headers: Mapping[str, TensorHeader]) -> dict[str, _Target]:
        if self.settings["peft_type"] != "LORA" or self.settings.get("fan_in_fan_out"):
            raise Unfoldable(f"a {self.settings['peft_type']} adapter")
        found: dict[str, _Target] = {}
        for name in self.headers:
            module, _, rest = name.partition(".lora_")
            weight = f"{module.removeprefix(WRAPPED)}.weight"
            if rest == "A.weight" and weight in headers and len(headers[weight].shape) == 2:
                magnitude = f"{module}.lora_magnitude_vector"
                found[weight] = _Target(
                    name, f"{module}.lora_B.weight", self._scale(weight, name),
                    magnitude if magnitude in self.headers else None,
                )  # fmt: skip
            elif rest not in ("B.weight", "magnitude_vector"):
                raise Unfoldable(f"the tensor {name}")
        return found

    def _scale(self, weight: str, a: str) -> float:
        module = weight.removesuffix(".weight")
        alphas: dict[str, float] = self.settings.get("alpha_pattern") or {}
        # PEFT's keys are regular expressions for the end of a module's name; the first that fits counts.
        alpha = next((value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)),
                     self.settings["lora_alpha"])  # fmt: skip
        r = self.headers[a].shape[0]
        return alpha / (math.sqrt(r) if self.settings.get("use_rslora") else r)

    def _factors(self, weight: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """B * scale, A and, for DoRA, the magnitudes."""
        target = self.targets[weight]
        magnitude = None if target.magnitude is None else self.files.whole(target.magnitude).flatten()
        return self.files.whole(target.b) * target.scale, self.files.whole(target.a), magnitude

    def add(self, weight: str, first: int, rows: Tensor) -> None:
        """Add the update to `rows`, the weight's rows from the row `first` on, in place.

        DoRA gives each row the length it has learned (Liu et al. 2024, arXiv:2402.09353, equation 5).
        """
        b, a, magnitude = self.factors(weight)
        rows.addmm_(b[first : first + rows.shape[0]], a)
        if magnitude is not None:
            lengths = rows.norm(dim=1)
            rows.mul_((magnitude[first : first + rows.shape[0]] / lengths)[:, None])


class Unfoldable(Exception):
    """An adapter that is not only low-rank updates of linear layers."""


def dump_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as the Hugging Face libraries do."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
