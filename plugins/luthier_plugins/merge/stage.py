"""Merges model folders tensor by tensor, holding one parameter of each model at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from luthier.api import Artifact, Facts, Merge, ModelError, StageContext
from luthier.artifacts.digest import files_in
from luthier.artifacts.models import TensorHeader, model_facts, tensor_headers
from luthier.train.loading import carry_text_files, full_weights, model_folder
from luthier_plugins.merge.config import MergeConfig
from luthier_plugins.merge.writer import DTYPES, StreamedFile
from safetensors import safe_open


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
        _check_storable(stored)
        weights = self.config.weights or [1.0] * len(models)
        file = StreamedFile(context.out / "model.safetensors", stored)
        with ExitStack() as stack:
            readers = [_Reader(folder, header, stack) for folder, header in zip(folders, headers, strict=True)]
            bases = readers[len(models) :] if method.needs_base else []
            file.write(_merged(file.order, method, weights, readers[: len(models)], bases, context))
        _carry_config(models[0], context.out)
        return {**model_facts(context.out), "merged": len(stored), "method": self.config.method.name}


def _merged(
    names: Sequence[str],
    method: Merge,
    weights: Sequence[float],
    models: Sequence[_Reader],
    bases: Sequence[_Reader],
    context: StageContext,
) -> Iterator[torch.Tensor]:
    """One merged tensor after the other; only one parameter of each model is in memory."""
    for done, name in enumerate(names):
        context.progress(done, len(names), "tensors")
        ancestor = bases[0].read(name) if bases else None
        result = method.merge([model.read(name) for model in models], weights, ancestor)
        if not bool(torch.isfinite(result).all()):
            raise ModelError("the merged tensor has NaN or infinite values", where=name)
        yield result


def _check_storable(headers: Mapping[str, TensorHeader]) -> None:
    odd = sorted(name for name, header in headers.items() if header.dtype not in DTYPES)
    if odd:
        raise ModelError(
            f"the dtype {headers[odd[0]].dtype} cannot be merged",
            where=odd[0],
            hint="merge the full-precision models, and quantize the result",
        )


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
