"""Takes a model folder into the store, its weights by reference, and records what it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from luthier.api import Facts, ModelError, Stage
from luthier.api.artifact import MANIFEST, REFERENCES
from luthier.artifacts.adapters import ADAPTER_CONFIG, is_adapter
from luthier.artifacts.digest import files_in
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.links import bring
from luthier.artifacts.models import check_model_folder, model_facts
from luthier.artifacts.tensors import PICKLES, TIES, own_tensors, stray_files, tensor_headers, with_true_ties
from luthier.artifacts.texts import DEFAULT, TOKENIZER_FILES, chat_templates
from luthier_plugins.base.config import BaseConfig

WEIGHTS_SUFFIX = ".safetensors"
OTHER_WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", *PICKLES)
"""Files of weights: in folders inside a model's, they are another program's copies."""


class Base(Stage[BaseConfig]):
    """The stage ``base``."""

    def run(self) -> Facts:
        context = self.context
        folder = context.path(self.config.source)
        _check(folder)
        left_out = [*stray_files(folder), *_weights_inside(folder)]
        if left_out:
            context.warn(
                f"{', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''}: no part of the model as transformers "
                "reads it; left out"
            )
        files = [path for path in files_in(folder) if _is_copied(path, folder, left_out)]
        references: dict[str, dict[str, str]] = {}
        for done, path in enumerate(files):
            context.progress(done, len(files), "files")
            target = context.out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != WEIGHTS_SUFFIX:
                shutil.copyfile(path, target)
            elif reference := bring(path, target, copied=self.config.owns_weights):
                references[target.name] = reference
        self._settle_ties()
        templates = chat_templates(context.out)
        if templates and DEFAULT not in templates:
            context.warn(
                f"the model has chat templates for {', '.join(templates)} and none named `{DEFAULT}`: it counts as a "
                "model without"
            )
        found = {REFERENCES: references} if references else {}
        return {**model_facts(context.out), "source": self.config.source, **found}

    def _settle_ties(self) -> None:
        """Have the config say of the output head what the weights say."""
        out = self.context.out
        config, stored = read_json(out / "config.json"), tensor_headers(out)
        own = own_tensors(out, config, stored)
        settled = with_true_ties(config, stored, own)
        if settled.get(TIES) is False and config.get(TIES) is not False:
            write_json(out / "config.json", settled)
            if config.get(TIES):
                self.context.warn(
                    f"the output head differs from the embedding, to which config.json ties it: `{TIES}: false` is "
                    "written, as transformers 5 reads it"
                )


def _check(folder: Path) -> None:
    """Refuse what is no model.

    Raises:
        ModelError: it is not.
    """
    if not folder.is_dir():
        raise ModelError("is not a folder", where=str(folder), hint="name the folder that holds config.json")
    if is_adapter(folder):
        raise ModelError(
            "is an adapter, not a model",
            where=str(folder),
            hint="use the stage `adapter`, which names the model it sits on",
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"has the weights of a model and an adapter ({ADAPTER_CONFIG}), with which transformers would load the "
            "adapter's own model instead of these weights",
            where=str(folder),
            hint="move the two into folders of their own",
        )
    check_model_folder(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError("has no tokenizer", where=str(folder), hint="copy the model's tokenizer files there")


def _weights_inside(folder: Path) -> Iterator[str]:
    """Files of weights in folders below."""
    for path in files_in(folder):
        if path.parent != folder and any(path.match(pattern) for pattern in OTHER_WEIGHTS):
            yield path.relative_to(folder).as_posix()


def _is_copied(path: Path, folder: Path, left_out: list[str]) -> bool:
    name = path.relative_to(folder).as_posix()
    pickled = any(path.match(pattern) for pattern in PICKLES)
    return not pickled and name not in left_out and path.name not in (MANIFEST, "README.md")
