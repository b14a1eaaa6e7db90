"""Merges model folders tensor by tensor, holding one parameter of each model at a time."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from luthier.api import Artifact, Facts, Merge, ModelError, StageContext
from luthier.artifacts.digest import files_in
from luthier.artifacts.models import TensorHeader, model_facts, tensor_headers
from luthier.train.loading import carry_text_files, full_weights, model_folder
from luthier_plugins.merge.config import MergeConfig
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        folders = [full_weights(model, context.work / f"folded-{place}")
                   for place, model in enumerate(models + ([base] if base else []))]  # fmt: skip
        headers = [tensor_headers(folder) for folder in folders]
        _check_same(headers)
        # Folding computes in float32; the result is stored like the first model's own weights.
        stored = tensor_headers(model_folder(models[0]))
        weights = self.config.weights or [1.0] * len(models)
        merged: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            readers = [_Reader(folder, header, stack) for folder, header in zip(folders, headers, strict=True)]
            for done, name in enumerate(sorted(headers[0])):
                context.progress(done, len(headers[0]), "tensors")
                tensors = [reader.read(name) for reader in readers[: len(models)]]
                ancestor = readers[-1].read(name) if base and method.needs_base else None
                result = method.merge(tensors, weights, ancestor)
                if not bool(torch.isfinite(result).all()):
                    raise ModelError("the merged tensor has NaN or infinite values", where=name)
                merged[name] = result.to(DTYPES[stored[name].dtype]).contiguous()
        _carry_config(models[0], context.out)
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

    def __init__(self, folder: Path, headers: dict[str, TensorHeader], stack: ExitStack) -> None:
        self._folder = folder
        self._headers = headers
        self._stack = stack
        self._files: dict[str, safe_open] = {}

    def read(self, name: str) -> torch.Tensor:
        file = self._headers[name].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        tensor = self._files[file].get_tensor(name).float()
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the tensor {name} has NaN or infinite values", where=str(self._folder))
        return tensor


def _carry_config(model: Artifact, out: Path) -> None:
    """Everything but weights: the config from the full model, the text files from the model itself."""
    for path in files_in(model_folder(model)):
        if path.suffix != ".safetensors" and path.name not in ("manifest.json", "model.safetensors.index.json"):
            shutil.copyfile(path, out / path.name)
    carry_text_files(model.path, out)
