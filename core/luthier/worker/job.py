"""What the runner gives the worker, and the protocol between the two: JSON lines over pipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.api.artifact import ArtifactKind


@dataclass(frozen=True, slots=True)
class Job:
    """One stage to run.

    Attributes:
        stage: The stage's id.
        component: The name of its component.
        config: The stage's config as a recipe would write it, defaults filled in.
        artifacts: Artifact folders by the values of the config's input fields.
        kinds: The kinds of inputs by field path.
        sources: Local places or pinned hub ids by the values of the config's source fields.
        seed: The seed.
        key: The key of what is made.
        out: An empty folder for the artifact.
        scratch: A folder that survives a crash.
        run: The run's id.
        recipe: The recipe's name.
        tracking: A folder for trackers that belongs to the stage and key.
        store: The store's root.
        trackers: The recipe's trackers, as a recipe would write them.
        step: The step of the checkpoint to go on from; None where there is none.
        ranks: How many processes compute it together.
        tests: The datasets that the recipe tests on, by the stage that does: artifact folders.
        preview: How many rows are looked at instead of trained on; 0: the stage runs.
        date: The recipe's date, as ``YYYY-MM-DD``; None where it has none.
    """

    stage: str
    component: str
    config: dict[str, Any]
    artifacts: dict[str, str]
    kinds: dict[str, list[ArtifactKind]]
    sources: dict[str, str]
    seed: int
    key: str
    out: str
    scratch: str
    run: str
    recipe: str
    tracking: str
    store: str
    trackers: list[dict[str, Any]]
    step: int | None = None
    ranks: int = 1
    date: str | None = None
    tests: dict[str, str] = field(default_factory=dict[str, str])
    preview: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which it can be made again."""
        return asdict(self)
