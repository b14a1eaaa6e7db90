"""Files that a recipe names: one, a folder of them, or a pattern."""

from __future__ import annotations

from pathlib import Path

from luthier.artifacts.digest import files_in

SIGNS = frozenset("*?[")
"""What makes a pattern of a path that does not exist."""


def files_at(place: Path) -> list[Path]:
    """The files of a place on this machine, sorted; none where there is nothing.

    Args:
        place: A file; a folder, of which all files below it count; or a pattern such as ``rows/*.jsonl``, where ``**``
            stands for any folders.
    """
    if place.is_file():
        return [place]
    if place.is_dir():
        return list(files_in(place))
    root = root_of(place)
    if root == place or not root.is_dir():
        return []
    pattern = str(place.relative_to(root))
    return sorted(path for path in root.glob(pattern) if path.is_file())


def root_of(place: Path) -> Path:
    """The folder that files of a place are named from: of a pattern, the one before its first sign."""
    if place.is_file():
        return place.parent
    if place.exists():
        return place
    for depth, part in enumerate(place.parts):
        if SIGNS & set(part):
            return Path(*place.parts[:depth])
    return place
