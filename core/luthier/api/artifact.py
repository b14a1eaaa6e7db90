"""Handles on artifacts: what a stage gets as input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from luthier.api.errors import StoreError

ArtifactKind = Literal["dataset", "model", "adapter", "export", "report"]
ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
"""Where a manifest has the digest of all else that it says."""
REFERENCES = "references"
"""The fact that says which files of a model or adapter lie elsewhere: their ``place``, and ``how`` they are linked."""
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
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "luthier" in manifest and "key" in manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 over what a manifest says, but for this digest itself."""
    said = {name: value for name, value in manifest.items() if name != CHECKSUM}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _problem_of(manifest: Any) -> str | None:
    """What is wrong with the content of a manifest."""
    if not isinstance(manifest, dict):
        return "it is not an object"
    found = cast("dict[str, Any]", manifest)
    if CHECKSUM in found and found[CHECKSUM] != manifest_digest(found):
        return "it was changed after it was written"
    texts = ("key", "kind", "stage")
    odd = [name for name in texts if not isinstance(found.get(name), str)]
    odd += [name for name in ("facts", "files", "inputs") if not isinstance(found.get(name), dict)]
    if odd:
        return f"it does not say {odd[0]}"
    if found["kind"] not in ARTIFACT_KINDS:
        return f"there is no kind {found['kind']!r}"
    lacking = [name for name in REQUIRED_FACTS[found["kind"]] if name not in found["facts"]]
    if lacking:
        return f"its facts lack {lacking[0]}"
    if not isinstance(found.setdefault("warnings", []), list):
        return "its warnings are no list"
    for name, about in found["files"].items():
        if not isinstance(about, dict) or not isinstance(cast("Any", about).get("size"), int) or "sha256" not in about:
            return f"it does not say what {name} is"
    for field, keys in found["inputs"].items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in cast("list[Any]", keys)):
            return f"its inputs under {field} are no list of keys"
    return None


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
        hint = "remove this folder; the next run recreates it"
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreError("there is no artifact here", where=str(path)) from error
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"the manifest cannot be read ({error})", where=str(path / MANIFEST), hint=hint) from error
        problem = _problem_of(manifest)
        if problem:
            raise StoreError(f"the manifest is damaged: {problem}", where=str(path / MANIFEST), hint=hint)
        return cls(manifest["key"], manifest["kind"], path, manifest["facts"], manifest)

    @classmethod
    def intact(cls, path: Path) -> Artifact:
        """Read an artifact of which all files are there.

        Raises:
            StoreError: see `load`; or a file is missing, or is not as long as it was.
        """
        found = cls.load(path)
        problem = found.damage()
        if problem:
            raise StoreError(
                f"this artifact is damaged: {problem}",
                where=str(path),
                hint="run its recipe again, which makes it anew; `luthier verify-store` looks at all of them",
            )
        return found

    def damage(self) -> str | None:
        """What is wrong with the files, by their names and sizes; None where they are as they were made."""
        for name, about in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                return self.told(name, "is missing")
            size = file.stat().st_size
            if size != about["size"]:
                return self.told(name, f"has {size} bytes, not {about['size']}")
        if self.kind in ("dataset", "model", "adapter"):
            # What is read as a whole: a file more is another dataset, another model.
            known = {*self.manifest["files"], MANIFEST}
            for file in sorted(self.path.iterdir()):
                if file.is_file() and file.name not in known and not file.name.startswith("."):
                    return f"{file.name} was not made with it"
        return None

    def place_of(self, name: str) -> Path | None:
        """Where a file lies that the artifact has by reference."""
        about: Mapping[str, str] | None = self.facts.get(REFERENCES, {}).get(name)
        return None if about is None else Path(about["place"])

    def told(self, name: str, what: str) -> str:
        """What is wrong with a file, and whose file it is where it lies elsewhere."""
        place = self.place_of(name)
        if place is None:
            return f"{name} {what}"
        return f"{name} {what}: it is {place} by reference, which was changed, moved or removed"

    def sibling(self, key: str) -> Artifact:
        """The artifact with `key` in the same store, such as the model an adapter sits on."""
        return Artifact.intact(self.path.parent / key)

    def siblings(self, keys: Sequence[str]) -> list[Artifact]:
        """Those of the artifacts with these keys that the same store has."""
        found: list[Artifact] = []
        for key in keys:
            with suppress(StoreError):
                found.append(self.sibling(key))
        return found

    @property
    def base(self) -> Artifact:
        """For an adapter: the model it sits on, beside it in the store or inside its folder as ``base``.

        Raises:
            StoreError: that model is in neither place.
        """
        key = self.facts["base"]
        for folder in (self.path.parent / key, self.path / BASE):
            if is_artifact(folder):
                return Artifact.intact(folder)
        raise StoreError(
            f"the model that this adapter sits on is missing (key {key[:12]})",
            where=str(self.path),
            hint=f"rerun the recipe that made it, or copy that model's folder to {self.path / BASE}",
        )
