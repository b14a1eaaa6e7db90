"""Takes an adapter from outside into the store, once it is known that it belongs on the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier.api import Facts, ModelError, Stage
from luthier.api.artifact import REFERENCES
from luthier.artifacts.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_facts
from luthier.artifacts.json_files import read_json
from luthier.artifacts.links import bring
from luthier.artifacts.models import carry_licences, carry_text_files
from luthier.artifacts.tensors import EMBEDDINGS, PICKLES, safetensors_header, tensor_headers
from luthier.artifacts.texts import (
    chat_templates,
    copy_text_files,
    remove_tokenizer,
    take_chat_templates,
    vocabulary_size,
)
from luthier.modeling.adapters import check_adapter, check_finite_adapter
from luthier_plugins.base.config import AdapterConfig

OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


class BaseAdapter(Stage[AdapterConfig]):
    """The stage ``adapter``."""

    def run(self) -> Facts:
        context = self.context
        folder, model = context.path(self.config.source), context.artifact(self.config.model)
        _check_folder(folder)
        _check_rows(folder, model.path)
        try:
            idle = check_adapter(folder, model.path)
        except ModelError as error:
            raise ModelError(error.message, where=error.where, hint=_hint(folder)) from error
        check_finite_adapter(folder)
        if idle:
            context.warn(f"the adapter brings nothing for {len(idle)} modules that its config names: {idle[0]}, ...")
        shutil.copyfile(folder / ADAPTER_CONFIG, context.out / ADAPTER_CONFIG)
        weights = bring(folder / ADAPTER_WEIGHTS, context.out / ADAPTER_WEIGHTS, copied=self.config.copy_weights)
        _carry_text(model.path, folder, context.out)
        found = {REFERENCES: {ADAPTER_WEIGHTS: weights}} if weights else {}
        return {**adapter_facts(context.out, model.key, model), "source": self.config.source, **found}


def _check_folder(folder: Path) -> None:
    """Refuse what PEFT would not have written."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"is not an adapter folder: {ADAPTER_CONFIG} is missing",
            where=str(folder),
            hint="a full model comes in with the stage `base`",
        )
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"has its weights as pickle files only ({', '.join(pickles[:3])})",
                where=str(folder),
                hint="pickle files can run code; convert them if you trust them",
            )
        raise ModelError(f"is not a complete adapter: {ADAPTER_WEIGHTS} is missing", where=str(folder))
    if not safetensors_header(folder / ADAPTER_WEIGHTS):
        raise ModelError("the adapter has no weights", where=str(folder), hint="save it again")


def _check_rows(folder: Path, model: Path) -> None:
    tokens = vocabulary_size(folder)
    rows = next((header.shape[0] for name, header in tensor_headers(model).items() if name.endswith(EMBEDDINGS)), None)
    if tokens is not None and rows is not None and tokens > rows:
        raise ModelError(
            f"the adapter's tokenizer has {tokens} tokens, the embedding of its model only {rows} rows",
            where=str(folder),
            hint="it was trained on a model with more tokens: fold it where it was made, and use the whole model",
        )


def _hint(folder: Path) -> str:
    named: Any = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return f"its config says that it was trained on '{named}'" if named else "name the model it was trained on"


def _carry_text(model: Path, adapter: Path, out: Path) -> None:
    """Text files of the model, and over them what the adapter brings: a tokenizer comes whole or not at all."""
    carry_text_files(model, out)
    if any((adapter / name).exists() for name in OWN_TOKENIZER):
        remove_tokenizer(out)
    copy_text_files(adapter, out)
    # Wherever either of them has its templates.
    take_chat_templates(adapter if chat_templates(adapter) else model, out)
    carry_licences(adapter, out, "adapter")
