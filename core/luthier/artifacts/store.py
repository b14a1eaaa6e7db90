"""The store's layout and everything that only reads it, so that planning can ask what is cached."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

from luthier.api.artifact import MANIFEST, Artifact, is_artifact
from luthier.api.errors import StoreError
from luthier.artifacts.digest import digest_file, digest_value
from luthier.artifacts.places import files_at, root_of

STORE_VARIABLE = "LUTHIER_STORE"
DEFAULT_STORE = ".luthier"
UNFINISHED = "new-"
"""How names begin of what is being written into the cache."""
LARGE = 1 << 24
"""Bytes of a file that takes long to read."""
_READ: dict[Path, str] = {}
"""What this process found, by where it is kept: a store may be full, or read-only."""
DIGEST = re.compile(r"[0-9a-f]{64}")


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

    @property
    def cache(self) -> Path:
        """What stages share that can be made again: tokens, log-probabilities of references, what was measured."""
        return self.root / "cache"

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
        """The finished artifact of a key, or None; one that lacks a file is none."""
        return self._looked_at(key)[0]

    def broken(self, key: str) -> str | None:
        """What is wrong with what is stored under a key, by names and sizes; None where nothing is, or nothing is
        there."""
        return self._looked_at(key)[1]

    def _looked_at(self, key: str) -> tuple[Artifact | None, str | None]:
        if not self.folder(key).exists():
            return None, None
        try:
            found = Artifact.load(self.folder(key))
        except StoreError as error:
            return None, error.message
        problem = found.damage() if found.key == key else "it is the artifact of another key"
        return (None, problem) if problem else (found, None)

    def __iter__(self) -> Iterator[Artifact]:
        for key in self.stored_keys():
            found = self.find(key)
            if found is not None:
                yield found

    def stored_keys(self) -> list[str]:
        """The keys under which something is stored, whole or not."""
        return sorted(path.name for path in self.artifacts.glob("*") if path.is_dir())

    def damage(self, artifact: Artifact, *, anew: bool = False) -> str | None:
        """What is wrong with an artifact's own files: they are not what they were.

        Args:
            artifact: The artifact.
            anew: Read every file, also those that have not changed since they were read.
        """
        problem = artifact.damage()
        if problem:
            return problem
        for name, about in artifact.manifest["files"].items():
            path = artifact.path / name
            if (digest_file(path) if anew else self._digest_file(path)) != about["sha256"]:
                return artifact.told(name, "has another content than it was made with")
        return None

    def intact(self, artifact: Artifact) -> Artifact:
        """An artifact whose files are what they were, and those of the model that an adapter sits on.

        Raises:
            StoreError: they are not.
        """
        problem = self.damage(artifact) or (self.damage(artifact.base) if artifact.kind == "adapter" else None)
        if problem:
            raise StoreError(
                f"this artifact is damaged: {problem}",
                where=str(artifact.path),
                hint="run its recipe again, which makes it anew; `luthier verify-store` looks at all of them",
            )
        return artifact

    def discard(self, key: str) -> None:
        """Remove what is stored under a key."""
        # Without its manifest a folder is no longer an artifact, should this be interrupted.
        (self.folder(key) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def resolve(self, text: str) -> Artifact:
        """The artifact meant by a key, the beginning of one (six digits at least), a folder, or
        ``<recipe>/<stage>`` as it was last run.

        Raises:
            StoreError: nothing, or more than one artifact, answers to it.
        """
        if is_artifact(Path(text)):
            return self.intact(Artifact.load(Path(text).absolute()))
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
        return self.intact(Artifact.load(found[0]))

    def last_keys(self, recipe: str) -> dict[str, Any]:
        """Key and key payload of every stage the last time this recipe was run, by stage id."""
        found = _read_object(self.root / "refs" / f"{recipe}.json")
        return {stage: payload for stage, payload in found.items() if _is_payload(payload)}

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
        """The digest of what a file, a folder or a pattern's files hold, remembered by size and modification time."""
        try:
            if path.is_file():
                return self._digest_file(path)
            root = root_of(path)
            return digest_value({str(file.relative_to(root)): self._digest_file(file) for file in files_at(path)})
        except OSError as error:
            raise StoreError(f"cannot be read: {error.strerror}", where=str(path)) from error

    def digest_large(self, paths: Iterable[Path], told: Callable[[int, int], None]) -> None:
        """Read the large files among these whose digest is not known, all at once, and remember it.

        Args:
            paths: Files.
            told: Hears how many bytes are read, of how many.
        """
        unknown = {path: size for path in dict.fromkeys(paths) if (size := path.stat().st_size) >= LARGE}
        unknown = {path: size for path, size in unknown.items() if self._remembered(path) is None}
        done, total, turn = 0, sum(unknown.values()), Lock()

        def read(count: int) -> None:
            nonlocal done
            with turn:
                done += count
                told(done, total)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(partial(digest_file, read=read), unknown)
            for path, digest in zip(unknown, digests, strict=True):
                self.remember(path, digest)

    def digest_once(self, path: Path) -> str:
        """The digest of a file that is about to move: one that is remembered is taken, a new one is not kept."""
        return self._digest_file(path, keep=False)

    def _digest_file(self, path: Path, *, keep: bool = True) -> str:
        digest = self._remembered(path)
        if digest is None:
            digest = digest_file(path)
            if keep:
                self.remember(path, digest)
        return digest

    def _remembered(self, path: Path) -> str | None:
        """The digest of a file that is as it was when it was read."""
        memory = self._memory_of(path)
        if memory in _READ:
            return _READ[memory]
        try:
            found = memory.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        return found if DIGEST.fullmatch(found) else None

    def _memory_of(self, path: Path) -> Path:
        """Where the digest of a file is kept as long as it is not changed; links lead to the file itself."""
        path = path.resolve()
        stat = path.stat()
        stamp = f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        return self.root / "digests" / digest_value(stamp)

    def remember(self, path: Path, digest: str) -> None:
        """Keep the digest of a file."""
        memory = self._memory_of(path)
        _READ[memory] = digest
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
            temporary.write_text(digest, encoding="ascii")
            temporary.replace(memory)
        except OSError:
            # Only a speed-up: planning has to work with a store that is read-only or full.
            return


def _is_payload(value: Any) -> bool:
    """Whether a value is what a key is made of."""
    if not isinstance(value, dict):
        return False
    inputs: Any = cast("dict[str, Any]", value).get("inputs")
    return isinstance(inputs, dict) and all(isinstance(keys, list) for keys in cast("dict[str, Any]", inputs).values())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _plain(name: str) -> str:
    """A name as one part of a path."""
    return re.sub(r"[^\w-]+", "_", name)
