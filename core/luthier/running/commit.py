"""Makes a finished scratch folder an artifact: hashed, fsynced, manifest last, one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.api.artifact import CHECKSUM, MANIFEST, REFERENCES, Artifact, ArtifactKind, manifest_digest
from luthier.api.errors import StoreError
from luthier.artifacts.completeness import check_complete
from luthier.artifacts.digest import files_in
from luthier.artifacts.store import Store


def commit(store: Store, key: str, kind: ArtifactKind, out: Path, about: dict[str, Any]) -> Artifact:
    """Move `out` into the store under `key`.

    Raises:
        StoreError: it cannot be written; then nothing is in the store under this key.
    """
    manifest: dict[str, Any] = {"luthier": 1, "key": key, "kind": kind, **about}
    check_complete(kind, out, manifest["facts"])
    try:
        referenced: Mapping[str, Mapping[str, str]] = manifest["facts"].get(REFERENCES, {})
        manifest["files"] = {
            (name := str(path.relative_to(out))): {
                "sha256": _digest(store, path, referenced.get(name)),
                "size": path.stat().st_size,
            }
            for path in files_in(out)
        }
        for path in files_in(out):
            if str(path.relative_to(out)) not in referenced:
                _sync(path)
        # As it will be read again, whatever plain values it was made of.
        manifest = json.loads(json.dumps(manifest, default=str))
        manifest[CHECKSUM] = manifest_digest(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        _sync(out / MANIFEST)
        store.artifacts.mkdir(parents=True, exist_ok=True)
        if store.folder(key).exists():
            # Damaged, or it would have been taken.
            store.discard(key)
        out.rename(store.folder(key))
        _sync(store.artifacts)
    except OSError as error:
        (out / MANIFEST).unlink(missing_ok=True)
        raise StoreError(
            f"the artifact cannot be stored: {error.strerror}",
            where=str(store.root),
            hint="free some space (`luthier clean`) or choose another store with --store, then run again: "
            "what was finished is kept",
        ) from error
    for name, about_file in manifest["files"].items():
        store.remember(store.folder(key) / name, about_file["sha256"])
    shutil.rmtree(store.work(key), ignore_errors=True)
    return Artifact.load(store.folder(key))


def _digest(store: Store, path: Path, reference: Mapping[str, str] | None) -> str:
    """The digest of a file; one that lies elsewhere was most likely read when its folder was identified."""
    if reference is not None and path.samefile(reference["place"]):
        return store.digest_source(Path(reference["place"]))
    return store.digest_once(path)


def adopt(store: Store, artifact: Artifact) -> None:
    """Copy an artifact from outside into the store, where it is not yet."""
    if store.find(artifact.key) is not None:
        return
    scratch = store.work(artifact.key) / "adopted"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(store.verified(artifact).path, scratch)
    store.artifacts.mkdir(parents=True, exist_ok=True)
    if store.folder(artifact.key).exists():
        store.discard(artifact.key)
    scratch.rename(store.folder(artifact.key))
    shutil.rmtree(store.work(artifact.key), ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
