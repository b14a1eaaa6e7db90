"""Resolves what a recipe takes from outside the store: files, folders, hub models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml

from luthier.api.errors import LuthierError, ModelError
from luthier.artifacts.adapters import ADAPTER_CONFIG
from luthier.artifacts.digest import files_in
from luthier.artifacts.places import files_at
from luthier.artifacts.store import Store
from luthier.recipe.document import parse

HUB = "hf:"
DATASETS = "datasets/"
"""What ids of datasets begin with in lock files and keys, as they do in the hub's own addresses."""
EMBEDDED = "embedded:"
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_FILES = 10_000
"""Files of a folder that a recipe names, at most."""


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A source with the digest of its content (of what is on the hub, its pinned commit) and its place."""

    digest: str
    place: str

    def unchanged(self, store: Store) -> bool:
        """Whether the content still has the digest; a pinned commit always does."""
        return self.place.startswith(HUB) or store.digest_source(Path(self.place)) == self.digest


def is_external(value: str) -> bool:
    """Whether an input's value comes from outside the recipe: a path, or an id with a scheme."""
    return "/" in value or value.startswith((".", HUB, EMBEDDED))


def resolve(value: str, kind: str, folder: Path, store: Store, lock: HubLock) -> ResolvedSource:
    """Find a source and what identifies its content.

    Raises:
        ModelError: a hub model cannot be pinned.
        LuthierError: a path does not exist.
    """
    if value.startswith(HUB):
        if kind == "file":
            raise LuthierError(f"'{value}' is a hub id where a file is expected", hint="download it, and give its path")
        repository, commit = lock.pin(f"{DATASETS if kind == 'data' else ''}{value.removeprefix(HUB)}")
        return ResolvedSource(f"{HUB}{repository}@{commit}", f"{HUB}{repository}@{commit}")
    if value.startswith(EMBEDDED):
        return _embedded(value, store)
    path = _local(value, kind, folder)
    return ResolvedSource(store.digest_source(path), str(path))


def files_of(value: str, kind: str, folder: Path) -> list[Path]:
    """The files of a source on this machine.

    Raises:
        LuthierError: a path does not exist.
    """
    if value.startswith((HUB, EMBEDDED)):
        return []
    return files_at(_local(value, kind, folder))


def _local(value: str, kind: str, folder: Path) -> Path:
    """The place of a source on this machine.

    Raises:
        LuthierError: it does not exist.
    """
    path = (folder / Path(value).expanduser()).absolute()
    try:
        there = path.exists()
    except (OSError, ValueError):
        # A name that no file can have.
        there = False
    if not there and kind == "data" and files_at(path):
        return path
    if not there:
        raise LuthierError(f"there is no file or folder '{value[:200]}'", hint=f"searched for {str(path)[:200]}")
    if path.is_dir():
        _check_folder(path, value, kind)
    elif not path.is_file():
        raise LuthierError(f"'{value}' is neither a file nor a folder", hint="name a file that can be read again")
    elif kind == "model":
        raise LuthierError(f"'{value}' is a file", hint="name the model's folder, which holds config.json")
    return path


def _check_folder(path: Path, value: str, kind: str) -> None:
    """Refuse a folder that is not meant, before all that is in it is read.

    Raises:
        LuthierError: it is no model's, or holds more files than anybody's data.
    """
    if kind == "model" and not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise LuthierError(
            f"'{value}' is no folder of a model: it has no config.json", hint="name the folder that holds it"
        )
    try:
        count = sum(1 for _ in islice(files_in(path, sort=False), MOST_FILES + 1))
    except OSError as error:
        raise LuthierError(f"'{value}' cannot be read: {error}") from error
    if count > MOST_FILES:
        raise LuthierError(
            f"'{value}' holds more than {MOST_FILES:,} files, all of which would be read",
            hint="name the folder of the data or the model itself",
        )


def _embedded(value: str, store: Store) -> ResolvedSource:
    """A model that comes with Luthier."""
    models = Path(str(files("luthier"))) / "models"
    path = models / value.removeprefix(EMBEDDED)
    if not (path / "config.json").exists():
        names = ", ".join(sorted(item.name for item in models.iterdir()))
        raise ModelError(f"there is no embedded model '{path.name}'", hint=f"there are: {names}")
    return ResolvedSource(store.digest_source(path), str(path))


class HubLock:
    """Pins hub ids to commits in ``<recipe>.lock.yaml`` beside the recipe."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.pins: dict[str, str] = {}
        if path is not None and path.exists():
            value: Any = parse(path.read_text(encoding="utf-8"), str(path)).value
            if not isinstance(value, dict | None):
                raise LuthierError("is not a mapping of hub ids to commits", where=str(path), hint="remove it")
            self.pins = dict(cast("dict[str, str]", value or {}))

    def pin(self, text: str) -> tuple[str, str]:
        """Repository and commit of ``org/name`` or ``org/name@revision``; of a dataset with ``datasets/`` before it.

        Raises:
            ModelError: the commit is not pinned yet and the hub cannot be asked.
        """
        repository, _, revision = text.partition("@")
        if COMMIT.fullmatch(revision):
            return repository, revision
        if text not in self.pins:
            self.pins[text] = _ask_hub(repository, revision or "main")
            if self.path is not None:
                self.path.write_text(yaml.safe_dump(self.pins), encoding="utf-8")
        return repository, self.pins[text]


def _ask_hub(repository: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    name = repository.removeprefix(DATASETS)
    kind = "model" if name == repository else "dataset"
    cached = Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / revision
    try:
        commit = HfApi().repo_info(name, revision=revision, repo_type=kind).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        if cached.exists():
            return cached.read_text(encoding="ascii").strip()
        raise ModelError(
            f"the hub cannot say which commit '{repository}' is at: {type(error).__name__}",
            hint="check the id and the network, or give the path of a local folder",
        ) from error
    if commit is None:
        raise ModelError(f"the hub names no commit for '{repository}' at '{revision}'")
    return commit
