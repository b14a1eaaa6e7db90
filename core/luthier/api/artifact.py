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
                hint="remove this folder; the next run makes it again",
            ) from error

    def sibling(self, key: str) -> Artifact:
        """The artifact with `key` in the same store, such as the model an adapter sits on."""
        return Artifact.load(self.path.parent / key)

    @property
    def base(self) -> Artifact:
        """For an adapter: the model it sits on.

        Raises:
            StoreError: that model is not in the store any more.
        """
        return self.sibling(self.facts["base"])
