"""Copies a model folder into the store and records what it is."""

from __future__ import annotations

import shutil

from luthier.api import Facts, ModelError, Stage
from luthier.artifacts.adapters import is_adapter
from luthier.artifacts.digest import files_in
from luthier.artifacts.models import PICKLES, TOKENIZER_FILES, check_model_folder, model_facts
from luthier_plugins.base.config import BaseConfig


class Base(Stage[BaseConfig]):
    """The stage ``base``."""

    def run(self) -> Facts:
        context = self.context
        folder = context.path(self.config.source)
        if not folder.is_dir():
            raise ModelError("is not a folder", where=str(folder), hint="name the folder that holds config.json")
        if is_adapter(folder):
            raise ModelError(
                "is an adapter, not a model",
                where=str(folder),
                hint="use the stage `adapter`, which names the model it sits on",
            )
        check_model_folder(folder)
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise ModelError("has no tokenizer", where=str(folder), hint="copy the model's tokenizer files there")
        files = [path for path in files_in(folder) if not any(path.match(pattern) for pattern in PICKLES)]
        for done, path in enumerate(files):
            context.progress(done, len(files), "files")
            target = context.out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name not in ("manifest.json", "README.md"):
                shutil.copyfile(path, target)
        return {**model_facts(context.out), "source": self.config.source}
