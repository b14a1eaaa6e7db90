"""The store's layout and everything that only reads it, so that planning can ask what is cached."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import MANIFEST, Artifact, is_artifact
from luthier.api.errors import StoreError
from luthier.artifacts.digest import digest_file, digest_value, files_in

STORE_VARIABLE = "LUTHIER_STORE"
DEFAULT_STORE = ".luthier"


@dataclass(frozen=True, slots=True)
class Store:
    """The folder that holds artifacts by key, scratch folders, locks and runs."""

    root: Path

    @classmethod
    def at(cls, path: str | Path | None = None) -> Store:
        """The store at `path`, else at ``$LUTHIER_STORE``, else ``.luthier`` in the current folder."""
        return cls(Path(path or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE).absolute())

    @property
    def artifacts(self) -> Path:
        """Finished artifacts, a folder a key."""
        return self.root / "store"

    @property
    def locks(self) -> Path:
        """One lock file per key."""
        return self.root / "locks"

    @property
    def runs(self) -> Path:
        """One folder per run: events, logs, report."""
        return self.root / "run"

    def tracking(self, recipe: str, stage: str, key: str) -> Path:
        """Where trackers write what they keep of a stage and key: the same place in every run that works on it."""
        # An artifact from outside is a stage by its path.
        return self.root / "tracking" / _plain(recipe) / f"{_plain(stage)}-{key[:12]}"

    def work(self, key: str) -> Path:
        """The scratch folder of a key; it survives a crash."""
        return self.root / "work" / key

    def folder(self, key: str) -> Path:
        """Where the artifact of a key is, once it is finished."""
        return self.artifacts / key

    def find(self, key: str) -> Artifact | None:
        """The finished artifact of a key, or None."""
        return Artifact.load(self.folder(key)) if (self.folder(key) / MANIFEST).exists() else None

    def __iter__(self) -> Iterator[Artifact]:
        for path in sorted(self.artifacts.glob(f"*/{MANIFEST}")):
            yield Artifact.load(path.parent)

    def resolve(self, text: str) -> Artifact:
        """The artifact meant by a key, the beginning of one (six digits at least), a folder, or
        ``<recipe>/<stage>`` as it was last run.

        Raises:
            StoreError: nothing, or more than one artifact, answers to it.
        """
        if is_artifact(Path(text)):
            return Artifact.load(Path(text).absolute())
        recipe, _, stage = text.partition("/")
        if Path(text).is_absolute():
            raise StoreError("there is no artifact here", where=text, hint="see `luthier show` for what there is")
        if stage in self.last_keys(recipe):
            text = digest_value(self.last_keys(recipe)[stage])
        is_key = len(text) >= 6 and all(letter in "0123456789abcdef" for letter in text)
        found = [path.parent for path in self.artifacts.glob(f"{text}*/{MANIFEST}")] if is_key else []
        if len(found) != 1:
            what = "no artifact answers" if not found else f"{len(found)} artifacts answer"
            raise StoreError(f"{what} to '{text}'", where=str(self.root), hint="see `luthier show` for what there is")
        return Artifact.load(found[0])

    def last_keys(self, recipe: str) -> dict[str, Any]:
        """Key and key payload of every stage the last time this recipe was run, by stage id."""
        return _read_object(self.root / "refs" / f"{recipe}.json")

    def recipes(self) -> list[str]:
        """The names of all recipes that were run on this store."""
        return sorted(path.stem for path in (self.root / "refs").glob("*.json"))

    def verified(self, artifact: Artifact) -> Artifact:
        """An artifact from outside the store, when its files are still what its manifest says.

        Raises:
            StoreError: a file was changed or is missing.
        """
        for name, about in artifact.manifest["files"].items():
            path = artifact.path / name
            if not path.is_file() or self._digest_file(path) != about["sha256"]:
                what = "was changed since it was made" if path.is_file() else "is missing"
                raise StoreError(
                    f"{name} of this artifact {what}",
                    where=str(artifact.path),
                    hint=f"to use it as it is, remove its {MANIFEST}: it is then taken as a folder from outside",
                )
        return artifact

    def digest_source(self, path: Path) -> str:
        """The digest of a file's or folder's content, remembered by size and modification time."""
        try:
            if path.is_file():
                return self._digest_file(path)
            return digest_value({str(file.relative_to(path)): self._digest_file(file) for file in files_in(path)})
        except OSError as error:
            raise StoreError(f"cannot be read: {error.strerror}", where=str(path)) from error

    def digest_once(self, path: Path) -> str:
        """The digest of a file that is about to move: one that is remembered is taken, a new one is not kept."""
        return self._digest_file(path, keep=False)

    def _digest_file(self, path: Path, *, keep: bool = True) -> str:
        stat = path.stat()
        stamp = f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        memory = self.root / "digests" / digest_value(stamp)
        try:
            return memory.read_text(encoding="ascii")
        except OSError:
            digest = digest_file(path)
        if not keep:
            return digest
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
            temporary.write_text(digest, encoding="ascii")
            temporary.replace(memory)
        except OSError:
            # Only a speed-up: planning has to work with a store that is read-only or full.
            return digest
        return digest


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _plain(name: str) -> str:
    """A name as one part of a path."""
    return re.sub(r"[^\w-]+", "_", name)
