"""The exporter ``hf``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact, Facts, ModelError, Quantizer, StageContext, Teacher
from luthier.artifacts.digest import digest_file, files_in
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.models import carry_licences, chat_template, model_facts, read_json
from luthier.modeling.calibration import texts_of, tuned_on
from luthier.modeling.compare import Comparison, compared, sequences_of
from luthier.modeling.generate import greedy_answers
from luthier.modeling.golden import LIMIT, conversations_of, entries_of
from luthier.modeling.loading import full_weights, load_client, load_model, load_tokenizer, to_best_device
from luthier.modeling.text import encode_prompt
from luthier.serving.bundle import write_bundle
from luthier_plugins.hf.compatible import generation_config, lost_in_version_4, model_config, tokenizer_config
from luthier_plugins.hf.config import HfConfig
from luthier_plugins.hf.weights import write_weights

CARRIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
UNTOLD = 4096
"""The context of a model that tells none."""
FINER = (
    "choose more bits or smaller groups, `skip` sensitive layers, name `calibration` data like what the model is for, "
    "or raise `max_kl`"
)
LARGEST_KL = 0.01
"""In nats per token: what rounding to another dtype costs at most."""
FEWEST = 0.5
"""Bytes of a weight with four bits: what a quantized folder takes at least."""
SUMS = "SHA256SUMS"
SHARD = 2_000_000_000
"""The largest size of one file, in bytes, where nobody says."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Hf:
    """Writes a folder that every client loads, and compares it with the model."""

    def __init__(self, config: HfConfig) -> None:
        self.config = config

    def export(self, model: Artifact, context: StageContext) -> Facts:
        source = full_weights(model, context.work / "folded")
        config = read_json(source / "config.json")
        if config.get("quantization_config"):
            raise ModelError(
                "the model is quantized already",
                where=str(source),
                hint="its folder is what quantization made: serve it as it is",
            )
        data = context.inputs("format.calibration") if self.config.calibration else tuned_on(model)
        parameters: int = model_facts(source)["parameters"]
        if self.config.quantize is not None:
            check_disk_space(context.out, int(FEWEST * parameters), "the quantized folder")
            about, limit = self._quantized(model, source, data, context)
        else:
            # A folded adapter is float32: its base's dtype is what the user thinks of.
            about = {"dtype": self.config.dtype or DTYPES[model.facts["dtype"]]}
            dtype: torch.dtype = getattr(torch, about["dtype"])
            check_disk_space(context.out, dtype.itemsize * parameters, "the folder")
            for done, total in write_weights(source, context.out, dtype, self.config.shard_size or SHARD):
                context.progress(done, total, "tensors")
            limit = LARGEST_KL
        name: str = about.pop("dtype")
        settings = {key: about[key] for key in ("quantization_config",) if key in about}
        _dump(context.out / "config.json", model_config(config, name) | settings)
        lost = lost_in_version_4(config)
        if lost:
            context.warn(lost)
        self._texts(source, model, context.out)
        loaded = replace(model, kind="model", path=context.out)
        tokenizer, client = load_tokenizer(loaded), load_client(loaded, context.work / "floats")
        verdict = self._compared(model, client, tokenizer, self.config.max_kl or limit, context)
        stored = self.config.quantize.name if self.config.quantize else name
        facts: Facts = {
            **model_facts(context.out),
            **verdict.facts(),
            **about,
            "parameters": parameters,
            "files": {stored: {"file": ".", "dtype": name, "bytes": _size(context.out)}},
            "context_length": config.get("max_position_embeddings") or config.get("n_positions") or UNTOLD,
            "stop_token_ids": model.facts["stop_token_ids"],
        }
        answers = partial(_answers, client, tokenizer, model.facts["stop_token_ids"], LIMIT, special=False)
        if self.config.serve:
            entries = entries_of(tokenizer, conversations_of(data), answers, facts["context_length"])
            if not entries:
                context.warn("the model has no chat template: the golden file has no entries")
            facts["serve"] = write_bundle(context.out, self.config.serve, ".", facts["context_length"], entries, LIMIT)
        _card(context.out, model, facts, stored)
        _sums(context.out)
        return facts

    def _quantized(
        self, model: Artifact, source: Path, data: Sequence[Artifact], context: StageContext
    ) -> tuple[Facts, float]:
        """Have the quantizer write the weights: what it says of them, and how far off they may be."""
        assert self.config.quantize is not None, "the caller asks first"
        quantizer: Quantizer = context.component(self.config.quantize)
        texts = texts_of(data, load_tokenizer(model)) if data else iter(())
        full = replace(model, kind="model", path=source)
        return quantizer.quantize(full, texts, context.out, context), quantizer.largest_kl

    def _texts(self, source: Path, model: Artifact, out: Path) -> None:
        """Everything but weights and config."""
        for name in CARRIED:
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
        carry_licences(source, out)
        _dump(out / "tokenizer_config.json", tokenizer_config(source))
        template = chat_template(source)
        if template is not None:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        found = generation_config(source, model.facts["stop_token_ids"])
        if found:
            _dump(out / "generation_config.json", found)

    def _compared(
        self, model: Artifact, client: Any, tokenizer: Any, limit: float, context: StageContext
    ) -> Comparison:
        """Compare the written folder with the model.

        Raises:
            ModelError: it reads or thinks differently.
        """
        right = load_tokenizer(model)
        sequences = sequences_of(right, tuned_on(model))
        if sequences_of(tokenizer, tuned_on(model)) != sequences:
            raise ModelError("the written tokenizer reads text differently", where=str(context.out))
        verdict = compared(to_best_device(load_model(model)), client, sequences)
        context.log(f"KL {verdict.kl:.2g} nats, same best token {verdict.top1:.0%}")
        if not verdict.kl <= limit:
            raise ModelError(
                f"the folder does not behave like the model it came from: mean KL divergence {verdict.kl:.3g} nats, "
                f"at most {limit:g} is expected",
                hint=FINER if self.config.quantize else "store it as bfloat16 or float32",
            )
        return verdict

    def serve(self, export: Artifact, variant: str | None, limit: int) -> AbstractContextManager[Teacher]:
        return _loaded(export, limit)


class _Client:
    """The exported folder in transformers."""

    def __init__(self, export: Artifact, limit: int, scratch: Path) -> None:
        folder = replace(export, kind="model")
        self._tokenizer = load_tokenizer(folder)
        self._model = load_client(folder, scratch)
        self._stops: list[int] = export.facts["stop_token_ids"]
        self._limit = limit

    def answer(self, prompts: Sequence[Sequence[Any]]) -> Iterator[str]:
        """One answer per conversation."""
        return _answers(self._model, self._tokenizer, self._stops, self._limit, prompts)


@contextmanager
def _loaded(export: Artifact, limit: int) -> Iterator[Teacher]:
    with tempfile.TemporaryDirectory() as scratch:
        yield _Client(export, limit, Path(scratch) / "floats")


def _answers(
    model: Any, tokenizer: Any, stops: list[int], limit: int, prompts: Any, *, special: bool = True
) -> Iterator[str]:
    ids = [encode_prompt(tokenizer, messages) for messages in prompts]
    return greedy_answers(model, tokenizer, ids, stops, limit, special=special)


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(folder: Path, model: Artifact, facts: Facts, dtype: str) -> None:
    stops = ", ".join(f"`{token}`" for token in model.facts.get("stop_tokens", [])) or "none"
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags:
- luthier
---

# {model.facts["architecture"]}

Made by Luthier from the model `{model.key[:12]}`. {facts["parameters"]:,} parameters as {dtype}; context:
{facts["context_length"]:,} tokens. It stops at: {stops}.

The folder was read back and compared with the model, both computed in float32: the tokenizer reads
{facts["texts"]} texts alike, the mean KL divergence over the whole vocabulary is {facts["kl"]:.2g} nats at
{facts["positions"]:,} positions, and the best token is the same at {facts["top1"]:.1%} of them.
`{SUMS}` has the digests of all files.
""",
        encoding="utf-8",
    )


def _sums(folder: Path) -> None:
    """Write the digests of all files, as ``sha256sum --check`` reads them."""
    lines = [f"{digest_file(path)}  {path.relative_to(folder).as_posix()}" for path in sorted(files_in(folder))]
    (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
