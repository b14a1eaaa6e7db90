"""The configs of the stages ``base`` and ``adapter``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from luthier.api import Input, ModelError, ModelSource, StageConfig, full_precision_problems
from luthier.api.artifact import REFERENCES, Artifact, ArtifactKind
from luthier.api.config import Components, NotIdentity
from luthier.artifacts.adapters import is_adapter
from luthier.artifacts.digest import digest_value
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import layer_names, shape_facts
from luthier.artifacts.tensors import tensor_headers
from luthier.artifacts.texts import chat_template

REFERENCED = "its weights are in the store by reference, and `copy_weights` asks for a copy"


class BaseConfig(StageConfig):
    """A model folder, or a hub model pinned to a commit."""

    kind_made: ClassVar[ArtifactKind] = "model"
    seeded: ClassVar[bool] = False
    quick: ClassVar[bool] = True

    source: ModelSource = "embedded:nano-base"
    """A folder with safetensors, config and tokenizer; or ``hf:org/name``, ``hf:org/name@revision``; or the
    small model that comes with Luthier, for trying things out on a CPU."""
    copy_weights: Annotated[bool, NotIdentity()] = False
    """Copy the weights into the store. Else they stay where they are and take no second place on the disk: as shared
    blocks or a hard link where the file system can, else as a link; if they change, the store says so."""

    @property
    def owns_weights(self) -> bool:
        """Whether weights are copied: those that come with Luthier go when it is installed anew."""
        return self.copy_weights or self.source.startswith("embedded:")

    def unfit(self, made: Artifact) -> str | None:
        return REFERENCED if self.owns_weights and REFERENCES in made.facts else None

    def resolved(self, sources: Mapping[str, Sequence[str]], components: Components) -> StageConfig:
        for place in sources.get("source", []):
            if not is_adapter(Path(place)):
                # What is wrong with a folder is said before anything is run.
                read_json(Path(place) / "config.json")
                tensor_headers(Path(place))
        return self

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        folders = [Path(place) for place in sources["source"] if Path(place).is_dir()]
        try:
            headers = [tensor_headers(folder) for folder in folders]
        except (ModelError, OSError):
            # The stage itself says what is wrong with it.
            return {}
        whole = [folder for folder in folders if not is_adapter(folder)]
        template = None if len(whole) != 1 else chat_template(whole[0])
        digest = None if template is None else digest_value(template)
        config = read_json(whole[0] / "config.json") if len(whole) == len(headers) == 1 else {}
        return {
            **({"chat_template": digest} if whole else {}),
            **({**shape_facts(config, headers[0]), "vocab_size": config.get("vocab_size")} if config else {}),
            "parameters": sum(math.prod(item.shape) for found in headers for item in found.values()),
            "layer_names": sorted({name for found in headers for name in layer_names(found)}),
        }


class AdapterConfig(StageConfig):
    """An adapter's folder as PEFT writes it, or one of the hub, on its model."""

    kind_made: ClassVar[ArtifactKind] = "adapter"
    seeded: ClassVar[bool] = False
    quick: ClassVar[bool] = True

    source: ModelSource
    """A folder with ``adapter_config.json`` and ``adapter_model.safetensors``; or ``hf:org/name``."""
    model: Annotated[str, Input(("model",))]
    """The model it was trained on. Its tokenizer, chat template and generation config are taken where the adapter
    brings none."""
    copy_weights: Annotated[bool, NotIdentity()] = False
    """Copy the weights into the store, see `base`."""

    def unfit(self, made: Artifact) -> str | None:
        return REFERENCED if self.copy_weights and REFERENCES in made.facts else None

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        # It may bring a template of its own.
        return {key: value for key, value in super().expected_facts(inputs, sources).items() if key != "chat_template"}

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return full_precision_problems(inputs, ("model",), "name the full-precision model that it was made from")
