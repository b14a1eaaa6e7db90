"""What the runner tells the worker, and how the two speak: JSON lines over pipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.api.artifact import ArtifactKind


@dataclass(frozen=True, slots=True)
class Job:
    """One stage to run.

    Attributes:
        config: The stage's config as a recipe would write it, defaults filled in.
        inputs: Artifact folders by field path.
        kinds: Their kinds, by field path.
        sources: Local places or pinned hub ids by field path.
        trackers: The recipe's trackers, as a recipe would write them.
    """

    stage: str
    component: str
    config: dict[str, Any]
    inputs: dict[str, list[str]]
    kinds: dict[str, list[ArtifactKind]]
    sources: dict[str, list[str]]
    seed: int
    out: str
    work: str
    run: str
    store: str
    trackers: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def out_folder(self) -> Path:
        return Path(self.out)
