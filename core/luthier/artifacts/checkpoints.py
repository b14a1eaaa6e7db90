"""Training checkpoints in a scratch folder: which of them are whole."""

from __future__ import annotations

from pathlib import Path

WHOLE = "luthier-whole"
"""A file that is written into a checkpoint when everything else is."""


def checkpoints(work: Path) -> tuple[list[Path], list[Path]]:
    """The whole checkpoints below a scratch folder, oldest first, and those that were cut short."""
    found = sorted(
        (path for path in work.glob("**/checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=step_of,
    )
    whole = [path for path in found if (path / WHOLE).exists()]
    return whole, [path for path in found if path not in whole]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def last_step(work: Path) -> int | None:
    """The step of the newest whole checkpoint below a scratch folder; None where there is none."""
    whole, _ = checkpoints(work)
    return step_of(whole[-1]) if whole else None


def mark_whole(checkpoint: Path) -> None:
    """Say that a checkpoint is whole."""
    (checkpoint / WHOLE).touch()
