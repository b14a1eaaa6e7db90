"""Copies an adapter from outside into the store, once it is known that it belongs on the model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.api import Facts, ModelError, StageContext
from luthier.artifacts.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_facts
from luthier.artifacts.models import (
    PICKLES,
    TOKENIZER_FILES,
    TensorHeader,
    carry_licences,
    carry_text_files,
    chat_template,
    read_json,
    safetensors_header,
    tensor_headers,
    vocabulary_size,
)
from luthier_plugins.base.config import AdapterConfig

SHOWN = 3
LAYERS = re.compile(r"(?:^|\.)((?:layers|blocks|h)\.\d+\..*)")
OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


class BaseAdapter:
    """The stage ``adapter``."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        folder, model = context.source("source"), context.input("model")
        headers = _checked(folder)
        base = tensor_headers(model.path)
        wrong = list(_misfits(headers, base))
        if wrong:
            more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise ModelError(f"the adapter does not belong on this model: {'; '.join(wrong[:SHOWN])}{more}",
                             where=str(folder), hint=_hint(folder))  # fmt: skip
        _check_rows(folder, base)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, context.out / name)
        _carry_text(model.path, folder, context.out)
        return {**adapter_facts(context.out, model.key, model), "source": self.config.source}


def _checked(folder: Path) -> dict[str, TensorHeader]:
    """The headers of an adapter's folder as PEFT writes it."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(f"is no adapter's folder: {ADAPTER_CONFIG} is missing", where=str(folder),
                         hint="a full model comes in with the stage `base`")  # fmt: skip
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise ModelError(f"has its weights as pickle files only ({', '.join(pickles[:3])})", where=str(folder),
                             hint="pickle files can run code; convert them where you trust them")  # fmt: skip
        raise ModelError(f"is no whole adapter: {ADAPTER_WEIGHTS} is missing", where=str(folder))
    headers = safetensors_header(folder / ADAPTER_WEIGHTS)
    if not headers:
        raise ModelError("the adapter has no weights", where=str(folder), hint="save it again")
    return headers


def _misfits(headers: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader]) -> Iterator[str]:
    """What of a LoRA adapter has no place, or another shape, in the model."""
    shapes = {_tail(name): header.shape for name, header in base.items()}
    # Of experts that are one parameter in memory, the files have many: below the same prefix.
    prefixes = {name[:place] for name in shapes for place, sign in enumerate(name) if sign == "."}
    for name, header in headers.items():
        module, found, _ = name.partition(".lora_A.")
        partner = headers.get(f"{module}.lora_B.weight")
        module = _tail(module.removesuffix(".base_layer"))
        if not found or partner is None:
            continue
        shape = shapes.get(f"{module}.weight")
        if shape is None and module not in prefixes and not module.endswith("lm_head"):
            yield f"it changes {module}, which the model does not have"
        # A Conv1D layer keeps its weight as (in, out).
        expected = (partner.shape[0], header.shape[1])
        if shape is not None and len(shape) == 2 and shape not in (expected, expected[::-1]):
            yield f"{module} is {list(shape)} in the model, and the adapter was made for {list(expected)}"


def _tail(name: str) -> str:
    """A name from its layers on: what stands before them differs between files and what is in memory."""
    inside = LAYERS.search(name)
    return inside[1] if inside else name.rpartition(".model.")[2]


def _check_rows(folder: Path, base: Mapping[str, TensorHeader]) -> None:
    tokens = vocabulary_size(folder)
    rows = next((header.shape[0] for name, header in base.items() if name.endswith("embed_tokens.weight")), None)
    if tokens is not None and rows is not None and tokens > rows:
        raise ModelError(
            f"the adapter's tokenizer has {tokens} tokens, the embedding of its model only {rows} rows",
            where=str(folder),
            hint="it was trained on a model with more tokens: fold it where it was made, and bring the whole model",
        )


def _hint(folder: Path) -> str:
    told: Any = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return f"its config says that it was trained on '{told}'" if told else "name the model it was trained on"


def _carry_text(model: Path, adapter: Path, out: Path) -> None:
    """Text files of the model, and over them what the adapter brings: a tokenizer comes whole or not at all."""
    carry_text_files(model, out)
    if any((adapter / name).exists() for name in OWN_TOKENIZER):
        for name in TOKENIZER_FILES:
            keeps = name == "chat_template.jinja" and chat_template(adapter) is None
            if not keeps:
                (out / name).unlink(missing_ok=True)
        carry_text_files(adapter, out)
    elif (adapter / "generation_config.json").exists():
        shutil.copyfile(adapter / "generation_config.json", out / "generation_config.json")
    carry_licences(adapter, out, "adapter")
