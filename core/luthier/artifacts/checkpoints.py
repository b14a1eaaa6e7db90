"""Training checkpoints in a scratch folder: which of them are whole."""

from __future__ import annotations

from pathlib import Path

WHOLE = "luthier-whole"
"""A file that is written into a checkpoint when everything else is."""


def checkpoints(work: Path) -> tuple[list[Path], list[Path]]:
    """The whole checkpoints below a scratch folder, oldest first, and those that were cut short."""
    found = sorted(
        (path for path in work.glob("**/checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    whole = [path for path in found if (path / WHOLE).exists()]
    return whole, [path for path in found if path not in whole]


def mark_whole(checkpoint: Path) -> None:
    """Say that a checkpoint is whole."""
    (checkpoint / WHOLE).touch()
