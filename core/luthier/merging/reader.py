"""Models whose tensors are read in parts as float32, with adapters added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.api import Artifact, ModelError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import TensorHeader, own_tensors, tensor_headers, with_true_ties
from luthier.merging.files import Files, Scratch, fill_on_cpu
from luthier.merging.lowrank import LowRank, in_file

NOT_FINITE = "the tensor has NaN or infinite values"
FROM_TRAINING = "train again with a lower learning rate, or take an earlier checkpoint"


class Source(Protocol):
    """A model whose tensors can be read in parts.

    Attributes:
        artifact: The model or adapter.
        label: The stage it came from, for messages.
        content: What identifies its content among other models'.
        headers: Its tensors.
        config: Its ``config.json``.
    """

    artifact: Artifact
    label: str
    content: str
    headers: dict[str, TensorHeader]
    config: dict[str, Any]

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out`, float32 of shape (rows, columns), on the CPU or a GPU, with whole rows of a tensor from the entry
        `start` on.

        Raises:
            ModelError: an entry is NaN or infinite.
        """
        ...

    def raw(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, uint8, with the tensor's bytes from the byte `first` on."""
        ...


class Weights:
    """The weights of a model, or of an adapter on its base: W + s B A, computed part by part.

    Args:
        artifact: The model or adapter.
        folded: Where the adapter was folded into its base, in float32, when that is not done here.

    Attributes:
        left_out: The tensors in its files that are not parameters.

    Raises:
        Unfoldable: only PEFT can fold the adapter.
    """

    def __init__(self, artifact: Artifact, folded: Path | None = None) -> None:
        folder = folded or full_of(artifact).path
        self.artifact = artifact
        self.label = label_of(artifact)
        self.content = content_of(artifact)
        self.config = read_json(folder / "config.json")
        stored = tensor_headers(folder)
        self.headers = own_tensors(folder, self.config, stored)
        self.config = with_true_ties(self.config, stored, self.headers)
        kept = set(self.headers.values())
        self.left_out = sorted(name for name, header in stored.items() if header not in kept)
        adds = artifact.kind == "adapter" and folded is None
        self.adapter = LowRank(artifact.path, self.headers, self.config) if adds else None
        self.files = Files(folder, self.headers)
        if folded is not None:
            self._store_like(full_of(artifact).path)

    def _store_like(self, base: Path) -> None:
        """Let what was computed in float32 count as stored in the base's dtypes."""
        theirs, config = tensor_headers(base), read_json(base / "config.json")
        names = {name: in_file(name, theirs) for name in self.headers}
        self.headers = {
            name: replace(header, dtype=theirs[names[name]].dtype) if names[name] in theirs else header
            for name, header in self.headers.items()
        }
        dtypes = ("dtype", "torch_dtype")
        self.config = {key: value for key, value in self.config.items() if key not in dtypes}
        self.config |= {key: config[key] for key in dtypes if key in config}

    def close(self) -> None:
        """Close the files."""
        self.files.close()
        if self.adapter is not None:
            self.adapter.close()

    def _where(self, name: str, start: int, out: Tensor, scratch: Scratch) -> str:
        """The place of a tensor with entries that are not numbers: the base's file, unless the adapter brought them."""
        folder, file = self.files.folder, self.headers[name].file
        if self.adapter is not None and self.adapter.changes(name):
            self.files.floats(name, start, out.view(-1), scratch)
            if bool(torch.isfinite(out).all()):
                folder, file = self.artifact.path, ADAPTER_WEIGHTS
        return f"{folder / file} ({self.label}): {name}"

    def raw(self, name: str, first: int, out: Tensor) -> None:
        self.files.raw(name, first, out)

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        adapter = self.adapter
        if adapter is None or not adapter.changes(name):
            self.files.floats(name, start, out.view(-1), scratch)
        else:
            fill_on_cpu(out, lambda here, before: self._adapted(adapter, name, start + before, here, scratch))
        # The sum is finite unless an entry is not, or the sum itself overflows: check entry by entry then.
        if not math.isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
            raise ModelError(NOT_FINITE, where=self._where(name, start, out, scratch), hint=FROM_TRAINING)

    def _adapted(self, adapter: LowRank, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        if not adapter.read(name, start, out, scratch):
            self.files.floats(name, start, out.view(-1), scratch)
        adapter.add(name, start // out.shape[1], out)


def whole(source: Source, name: str) -> Tensor:
    """A whole tensor as float32, in its own shape."""
    shape = source.headers[name].shape
    out = torch.empty(shape)
    if out.numel():
        source.read(name, 0, out.view(-1, shape[-1] if shape else 1), Scratch())
    return out


def full_of(model: Artifact) -> Artifact:
    """The model, or what an adapter sits on."""
    return model.base if model.kind == "adapter" else model


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
