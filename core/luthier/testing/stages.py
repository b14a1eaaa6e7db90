"""Runs stages in the current process, and makes small real models and datasets for them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import Artifact, ArtifactKind
from luthier.api.config import Input, Source, StageConfig, references
from luthier.api.protocols import Row
from luthier.artifacts.datasets import Split, dataset_facts, write_split
from luthier.artifacts.digest import digest_value
from luthier.artifacts.store import Store
from luthier.registry import Registry, default_registry
from luthier.running.commit import commit
from luthier.worker.job import Job
from luthier.worker.worker import Context, check_facts, seed_everything

TEXTS = (
    "The quick brown fox jumps over the lazy dog while 12 grey geese fly south.",
    "Please open the door, close the window and put 3 cups on the table.",
    "Where is the letter? It is under the red box, beside the old lamp.",
)


class _Listener:
    """Stands where the worker process stands in a run; keeps the events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def stopping(self) -> bool:
        return False

    def send(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def run_stage(
    folder: Path,
    uses: str,
    config: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Artifact | Sequence[Artifact]] | None = None,
    seed: int = 0,
    registry: Registry | None = None,
) -> Artifact:
    """Run one stage in this process, without a recipe, a plan or a worker.

    Args:
        folder: A store; the artifact is in it afterwards.
        uses: The stage's name.
        config: Its config but for the inputs.
        inputs: Artifacts by field.
        seed: The seed.
        registry: Where components are looked up; by default the installed plugins.

    Returns:
        The artifact. What the stage raises is not caught.
    """
    registry = registry or default_registry()
    given = {name: [item] if isinstance(item, Artifact) else list(item) for name, item in (inputs or {}).items()}
    component = registry.get("stage", uses)
    config_class = registry.config_class(component)
    values: dict[str, Any] = copy.deepcopy(dict(config or {}))
    for name, items in given.items():
        many = not isinstance((inputs or {})[name], Artifact)
        _put(values, name, [f"{name}-{place}" for place in range(len(items))] if many else name)
    made = cast("StageConfig", config_class.model_validate(values, context={"components": registry}))
    kinds: dict[str, list[ArtifactKind]] = {path: [item.kind for item in items] for path, items in given.items()}
    kinds = {path: [] for path, _, _ in references(made, Input)} | kinds
    key = digest_value(
        {
            "stage": uses,
            "config": made.model_dump(mode="json"),
            "seed": seed,
            "inputs": {name: [item.key for item in items] for name, items in given.items()},
        }
    )
    store = Store(folder)
    shutil.rmtree(store.folder(key), ignore_errors=True)
    work = store.work(key)
    (work / "out").mkdir(parents=True, exist_ok=True)
    job = Job(
        stage=uses,
        component=uses,
        config=made.model_dump(mode="json"),
        inputs={name: [str(item.path) for item in items] for name, items in given.items()},
        kinds=kinds,
        sources={path: values for path, _, values in references(made, Source) if values},
        seed=seed,
        out=str(work / "out"),
        work=str(work),
        run=str(store.runs),
        store=str(store.root),
        trackers=[],
    )
    context = Context(job, registry, _Listener())
    stage = registry.impl_class(component)(made)
    seed_everything(seed)
    facts = stage.run(context)
    check_facts(facts, made.produces(kinds), str(registry.provider(component)))
    about = {
        "stage": uses,
        "facts": facts,
        "warnings": context.warnings,
        "inputs": {name: [item.key for item in items] for name, items in given.items()},
    }
    return commit(store, key, made.produces(kinds), work / "out", about)


def _put(values: Any, path: str, value: Any) -> None:
    """Set what stands at a path such as ``slices.0.sources.1.model``."""
    *parents, last = path.split(".")
    for part in parents:
        values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
    values[last] = value


def tiny_dataset(folder: Path, rows: Sequence[Row] | None = None, *, split: Split = "train") -> Artifact:
    """A dataset artifact of these rows; by default three short texts.

    Args:
        folder: A store.
        rows: Rows of the format ``text``, ``messages`` or ``preference``.
        split: Where they go.
    """
    rows = list(rows or [{"text": text} for text in TEXTS])
    form = next((name for name in ("messages", "text") if name in rows[0]), "preference")
    key = digest_value({"rows": rows, "split": split})
    store = Store(folder)
    if store.find(key) is None:
        out = store.work(key) / "out"
        out.mkdir(parents=True, exist_ok=True)
        write_split(out, split, rows)
        facts = dataset_facts(form, {split: rows}, {})
        commit(store, key, "dataset", out, {"stage": "data", "facts": facts, "warnings": [], "inputs": {}})
    return Artifact.load(store.folder(key))


def tiny_model(folder: Path, *, seed: int = 0, texts: Sequence[str] = TEXTS, **sizes: Any) -> Artifact:
    """A Llama model with random weights, a byte-level tokenizer and a ChatML template, made in a second.

    Args:
        folder: A store.
        seed: The seed of the weights.
        texts: What the tokenizer is trained on.
        **sizes: Config of the stage ``init``, such as ``hidden_size`` or ``layers``.
    """
    config = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers": 2,
        "heads": 4,
        "dtype": "float32",
        **sizes,
    }
    data = tiny_dataset(folder, [{"text": text} for text in texts])
    return run_stage(folder, "init", config, inputs={"data": [data]}, seed=seed)
