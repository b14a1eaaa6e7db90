"""Merges model folders tensor by tensor, holding one parameter of each model at a time."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import torch
from luthier.api import Artifact, Facts, Merge, ModelError, StageContext
from luthier.artifacts.digest import files_in
from luthier.artifacts.models import TensorHeader, model_facts, tensor_headers
from luthier_plugins.merge.config import MergeConfig
from safetensors import safe_open
from safetensors.torch import save_file


class MergeStage:
    """The stage ``merge``."""

    def __init__(self, config: MergeConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        models = context.inputs("models")
        method: Merge = context.component(self.config.method)
        base = context.input("base") if self.config.base else None
        if method.needs_base and base is None:
            raise ModelError(f"{self.config.method.name} merges task vectors", hint="name their ancestor as `base`")
        headers = [tensor_headers(model.path) for model in [*models, *([base] if base else [])]]
        _check_same(headers)
        weights = self.config.weights or [1.0] * len(models)
        merged: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            readers = [_Reader(model, stack) for model in models]
            base_reader = _Reader(base, stack) if base else None
            for done, name in enumerate(sorted(headers[0])):
                context.progress(done, len(headers[0]), "tensors")
                tensors = [reader.read(name, headers[index]) for index, reader in enumerate(readers)]
                ancestor = base_reader.read(name, headers[-1]) if base_reader and method.needs_base else None
                result = method.merge(tensors, weights, ancestor)
                if not bool(torch.isfinite(result).all()):
                    raise ModelError("the merged tensor has NaN or infinite values", where=name)
                merged[name] = result.to(readers[0].dtype(name, headers[0])).contiguous()
        for path in files_in(models[0].path):
            if path.suffix != ".safetensors" and path.name not in ("manifest.json", "model.safetensors.index.json"):
                shutil.copyfile(path, context.out / path.name)
        save_file(merged, context.out / "model.safetensors", metadata={"format": "pt"})
        return {**model_facts(context.out), "merged": len(merged), "method": self.config.method.name}


def _check_same(headers: list[dict[str, TensorHeader]]) -> None:
    for other in headers[1:]:
        odd = sorted(set(headers[0]) ^ set(other))
        if odd:
            raise ModelError(f"the models do not have the same tensors: {', '.join(odd[:5])}")
        for name, header in headers[0].items():
            if header.shape != other[name].shape:
                raise ModelError(f"the shapes differ: {header.shape} and {other[name].shape}", where=name)


class _Reader:
    """Reads single tensors of one model folder as float32."""

    def __init__(self, model: Artifact, stack: ExitStack) -> None:
        self._folder = model.path
        self._stack = stack
        self._files: dict[str, safe_open] = {}

    def _tensor(self, name: str, headers: dict[str, TensorHeader]) -> torch.Tensor:
        file = headers[name].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        return self._files[file].get_tensor(name)

    def read(self, name: str, headers: dict[str, TensorHeader]) -> torch.Tensor:
        tensor = self._tensor(name, headers).float()
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the tensor {name} has NaN or infinite values", where=str(self._folder))
        return tensor

    def dtype(self, name: str, headers: dict[str, TensorHeader]) -> torch.dtype:
        return self._tensor(name, headers).dtype
