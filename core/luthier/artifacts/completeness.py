"""Whether an artifact has all that belongs to one of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.api.artifact import ArtifactKind
from luthier.api.errors import LuthierError, StoreError
from luthier.artifacts.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import safetensors_header, tensor_headers
from luthier.artifacts.texts import tokenizer_digest


def check_complete(kind: ArtifactKind, folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks what its facts say, before it is stored.

    Args:
        kind: What it should hold.
        folder: The folder.
        facts: What its manifest will say.

    Raises:
        StoreError: it is not complete.
    """
    try:
        problem = _problem(kind, folder, facts)
    except LuthierError as error:
        problem = error.message
    if problem:
        raise StoreError(
            f"what the stage made is no whole {kind}: {problem}",
            where=str(folder),
            hint="nothing was stored; was the store, or a file in it, removed meanwhile? run again",
        )


def _problem(kind: ArtifactKind, folder: Path, facts: Mapping[str, Any]) -> str | None:
    if kind == "dataset":
        lacking = [
            split for split, rows in facts["rows"].items() if rows and not (folder / f"{split}.parquet").is_file()
        ]
        return f"it has no file for the split '{lacking[0]}'" if lacking else None
    if kind == "model":
        read_json(folder / "config.json")
        tensor_headers(folder)
    if kind == "adapter":
        read_json(folder / ADAPTER_CONFIG)
        safetensors_header(folder / ADAPTER_WEIGHTS)
    if kind in ("model", "adapter") and tokenizer_digest(folder) != facts["tokenizer"]:
        return "its tokenizer is not the one that its facts name, or is missing"
    if kind == "export":
        described: Mapping[str, Mapping[str, Any]] = facts["files"]
        files = [str(about["file"]) for about in described.values() if "file" in about]
        lacking = [name for name in files if not (folder / name).exists()]
        return f"it has no file {lacking[0]}" if lacking else None
    return None
