"""Handles on artifacts: what a stage gets as input."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from luthier.api.errors import StoreError

ArtifactKind = Literal["dataset", "model", "adapter", "export", "report"]
ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
MANIFEST = "manifest.json"
BASE = "base"
"""Where an adapter that left its store has the model it sits on."""


REQUIRED_FACTS: dict[ArtifactKind, tuple[str, ...]] = {
    "dataset": ("schema", "rows"),
    "model": ("architecture", "dtype", "parameters", "tensors", "tokenizer", "stop_token_ids"),
    "adapter": ("base", "adapter", "architecture", "tokenizer", "stop_token_ids"),
    "export": ("format", "files"),
    "report": (),
}
"""What the facts of an artifact of each kind have at least; `luthier.artifacts` makes those of datasets and models."""


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an artifact: its manifest is one of Luthier's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "luthier" in manifest and "key" in manifest


@dataclass(frozen=True, slots=True)
class Artifact:
    """An immutable folder with a manifest. Its presence in the store means it is complete.

    Attributes:
        key: The sha256 that identifies it.
        kind: What it holds.
        path: The folder.
        facts: What the stage recorded of it: architecture, stop tokens, row counts, metrics, ...
        manifest: The whole manifest.
    """

    key: str
    kind: ArtifactKind
    path: Path
    facts: dict[str, Any]
    manifest: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read the manifest of the artifact folder `path`.

        Raises:
            StoreError: there is no manifest, or it is not one of Luthier's.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return cls(manifest["key"], manifest["kind"], path, manifest["facts"], manifest)
        except FileNotFoundError as error:
            raise StoreError("there is no artifact here", where=str(path)) from error
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(
                f"the manifest cannot be read ({error})",
                where=str(path / MANIFEST),
                hint="remove this folder; the next run recreates it",
            ) from error

    def sibling(self, key: str) -> Artifact:
        """The artifact with `key` in the same store, such as the model an adapter sits on."""
        return Artifact.load(self.path.parent / key)

    @property
    def base(self) -> Artifact:
        """For an adapter: the model it sits on, beside it in the store or inside its folder as ``base``.

        Raises:
            StoreError: that model is in neither place.
        """
        key = self.facts["base"]
        for folder in (self.path.parent / key, self.path / BASE):
            if is_artifact(folder):
                return Artifact.load(folder)
        raise StoreError(
            f"the model that this adapter sits on is missing (key {key[:12]})",
            where=str(self.path),
            hint=f"rerun the recipe that made it, or copy that model's folder to {self.path / BASE}",
        )
