"""The exporter ``hf``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact, Exporter, Facts, Generator, ModelError
from luthier.artifacts.digest import digest_file, files_in
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import model_facts
from luthier.merging.folding import full_weights
from luthier.modeling.calibration import tuned_on
from luthier.modeling.generate import TransformersGenerator
from luthier.modeling.golden import LIMIT, conversations_of, entries_of
from luthier.modeling.loading import model_folder
from luthier.modeling.quantizing import check_folder, computed_in, quantize, write_folder_texts
from luthier.modeling.weights import write_weights
from luthier.serving.bundle import write_bundle
from luthier_plugins.hf.config import NOT_FOR_TGI, HfConfig

DEFAULT_CONTEXT = 4096
"""The context of a model that states none."""
LARGEST_KL = 0.01
"""In nats per token: what rounding to another dtype costs at most."""
SUMS = "SHA256SUMS"
SHARD = 2_000_000_000
"""The largest size of one file, in bytes, unless `shard_size` says otherwise."""
NOT_IN_HALF = ("gemma2", "gemma3", "gemma3_text", "plamo2", "glm4")
"""Types of models that vLLM refuses in float16."""
IN_HALF = ("awq", "gptq")
"""Quantizers whose kernels compute in float16."""
SAID = ("kl", "top1", "perplexity", "reference_perplexity", "positions", "texts", "layers", "calibration",
        "quantized_parameters", "kl_computed_in")  # fmt: skip
"""What of a quantized model's facts an export says itself."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Hf(Exporter[HfConfig]):
    """Writes a folder that every client loads, and compares it with the model."""

    def export(self, model: Artifact) -> Facts:
        data = self.context.artifacts([self.config.calibration]) if self.config.calibration else tuned_on(model)
        self._check_targets(model)
        if "quantization" in model.facts:
            facts = self._as_it_is(model)
        elif self.config.quantize is not None:
            facts = self._quantized(model, data)
        else:
            facts = self._in_full(model)
        config = read_json(self.context.out / "config.json")
        facts["context_length"] = config.get("max_position_embeddings") or config.get("n_positions") or DEFAULT_CONTEXT
        facts["stop_token_ids"] = model.facts["stop_token_ids"]
        if self.config.serve:
            facts["serve"] = self._bundle(model, data, facts["context_length"])
        _card(self.context.out, model, facts, next(iter(facts["files"])))
        _sums(self.context.out)
        return facts

    def _check_targets(self, model: Artifact) -> None:
        """Refuse what a server that is named would refuse, before anything is computed."""
        config = read_json(model_folder(model) / "config.json")
        kind, name = str(config.get("model_type")), self._dtype(model, config)
        method: str | None = (config.get("quantization_config") or {}).get("quant_method")
        problem: str | None = None
        if name == "float16" and kind in NOT_IN_HALF:
            problem = f"vLLM does not serve a {kind} in float16, in which it is numerically unstable"
        elif name == "bfloat16" and method == "awq":
            problem = "vLLM's kernels for AWQ compute in float16, and config.json says bfloat16"
        if problem and "vllm" in self.config.serve:
            raise ModelError(problem, where=str(model.path), hint="store it as bfloat16, or choose int8, fp8 or GGUF")
        if problem:
            self.context.warn(problem)
        if "tgi" in self.config.serve and model.facts.get("quantization", {}).get("method") in NOT_FOR_TGI:
            raise ModelError(
                f"TGI does not load {model.facts['quantization']['method']}",
                where=str(model.path),
                hint="choose awq, gptq, int8 or fp8",
            )

    def _dtype(self, model: Artifact, config: Mapping[str, Any]) -> str:
        """What weights that are not quantized will be stored as, and computed in."""
        if "quantization" in model.facts:
            return str(config.get("dtype") or config.get("torch_dtype"))
        if self.config.quantize is not None and self.config.quantize.name in IN_HALF:
            return "float16"
        return self.config.dtype or DTYPES[model.facts["dtype"]]

    def _as_it_is(self, model: Artifact) -> Facts:
        """A model that the stage `quantize` made, or that came quantized: its folder is what servers load."""
        if self.config.quantize is not None or self.config.dtype is not None or self.config.max_kl is not None:
            raise ModelError(
                f"the model is quantized already ({model.facts['quantization']['method']})",
                where=str(model.path),
                hint="it is written as it is: leave `quantize`, `dtype` and `max_kl` out",
            )
        for path in files_in(model.path):
            if path.name not in ("manifest.json", "README.md", SUMS):
                target = self.context.out / path.relative_to(model.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        return _quantized_facts(dict(model.facts), self.context.out)

    def _quantized(self, model: Artifact, data: Sequence[Artifact]) -> Facts:
        """The stages `quantize` and `export` in one."""
        assert self.config.quantize is not None, "the caller asks first"
        source = full_weights(model, self.context.scratch / "folded")
        made = quantize(model, source, self.config.quantize, data, self.config.max_kl, self.context)
        return _quantized_facts(made, self.context.out)

    def _in_full(self, model: Artifact) -> Facts:
        """The weights in one dtype."""
        source = full_weights(model, self.context.scratch / "folded")
        # A folded adapter is float32: its base's dtype is what the user thinks of.
        name = self.config.dtype or DTYPES[model.facts["dtype"]]
        dtype: torch.dtype = getattr(torch, name)
        parameters: int = model_facts(source)["parameters"]
        check_disk_space(self.context.out, dtype.itemsize * parameters, "the folder")
        for done, total in write_weights(source, self.context.out, dtype, self.config.shard_size or SHARD):
            self.context.progress(done, total, "tensors")
        write_folder_texts(model, source, name, {}, self.context)
        limit = LARGEST_KL if self.config.max_kl is None else self.config.max_kl
        verdict = check_folder(
            model, source, limit, "store it as bfloat16 or float32", self.context, computed_in({}, name)
        )
        files = {name: {"file": ".", "dtype": name, "bytes": _size(self.context.out)}}
        return {**model_facts(self.context.out), **verdict, "parameters": parameters, "files": files}

    def _bundle(self, model: Artifact, data: Sequence[Artifact], length: int) -> list[str]:
        written = replace(model, kind="model", path=self.context.out)
        with TransformersGenerator(written, self.context.scratch / "served", special=False) as client:
            entries = entries_of(client.tokenizer, conversations_of(data), client, length)
        if not entries:
            self.context.warn("the model has no chat template: the golden file has no entries")
        return write_bundle(self.context.out, self.config.serve, ".", length, entries, LIMIT)

    def open(self, export: Artifact, variant: str | None) -> AbstractContextManager[Generator[Any]]:
        return _loaded(export)


@contextmanager
def _loaded(export: Artifact) -> Iterator[Generator[Any]]:
    """The exported folder in transformers."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        TransformersGenerator(replace(export, kind="model"), Path(scratch) / "floats") as generator,
    ):
        yield generator


def _quantized_facts(facts: Facts, folder: Path) -> Facts:
    """What an export says of a quantized model's folder."""
    about: Facts = facts["quantization"]
    stored = {key: about[key] for key in SAID if key in about}
    dtype = facts.get("stored_as") or read_json(folder / "config.json").get("dtype")
    files = {about["method"]: {"file": ".", "dtype": dtype, "bytes": _size(folder)}}
    return {
        **facts,
        **stored,
        "files": files,
        "quantization_config": read_json(folder / "config.json")["quantization_config"],
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(folder: Path, model: Artifact, facts: Facts, dtype: str) -> None:
    stops = ", ".join(f"`{token}`" for token in model.facts.get("stop_tokens", [])) or "none"
    compared = ""
    if "kl" in facts:
        compared = f"""
The folder was read back and compared with the model, both computed in float32: the tokenizer reads
{facts["texts"]} texts alike, the mean KL divergence over the whole vocabulary is {facts["kl"]:.2g} nats at
{facts["positions"]:,} positions, and the best token is the same at {facts["top1"]:.1%} of them.
"""
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags:
- luthier
---

# {model.facts["architecture"]}

Made by Luthier from the model `{model.key[:12]}`. {_counted(facts, dtype)}; context:
{facts["context_length"]:,} tokens. It stops at: {stops}.
{compared}
`{SUMS}` has the digests of all files.
""",
        encoding="utf-8",
    )


def _counted(facts: Facts, dtype: str) -> str:
    """How many parameters there are, and as what."""
    whole: int = facts["parameters"]
    fewer: int = facts.get("quantized_parameters", whole)
    rest = f", {whole - fewer:,} as {facts['files'][dtype]['dtype']}" if fewer < whole else ""
    return f"{fewer:,} parameters as {dtype}{rest}"


def _sums(folder: Path) -> None:
    """Write the digests of all files, as ``sha256sum --check`` reads them."""
    lines = [f"{digest_file(path)}  {path.relative_to(folder).as_posix()}" for path in sorted(files_in(folder))]
    (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
