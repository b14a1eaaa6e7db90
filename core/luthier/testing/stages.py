"""Runs stages in the current process, and makes small real models and datasets for them."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import CHECKSUM, MANIFEST, Artifact, ArtifactKind, manifest_digest
from luthier.api.config import Input, Source, StageConfig, Use, references
from luthier.api.data import Row, Schema
from luthier.artifacts.datasets import Split, dataset_facts, write_split
from luthier.artifacts.digest import digest_file, digest_value, files_in
from luthier.artifacts.rows import COLUMNS, SCHEMAS
from luthier.artifacts.store import Store
from luthier.registry import Registry, default_registry
from luthier.running.commit import commit
from luthier.serving.access import PluginAccess
from luthier.worker.context import JobContext
from luthier.worker.execute import check_facts, seed_everything
from luthier.worker.job import Job

TEXTS = (
    "The quick brown fox jumps over the lazy dog while 12 grey geese fly south.",
    "Please open the door, close the window and put 3 cups on the table.",
    "Where is the letter? It is under the red box, beside the old lamp.",
)


class _Listener:
    """Takes the place of the worker process in a run; keeps the events."""

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
    date: datetime.date | None = None,
    registry: Registry | None = None,
) -> Artifact:
    """Run one stage in this process, without a recipe, a plan or a worker.

    Args:
        folder: A store; the artifact is in it afterwards.
        uses: The stage's name.
        config: Its config but for the inputs.
        inputs: Artifacts by field.
        seed: The seed.
        date: The recipe's date.
        registry: Where components are looked up; by default the installed plugins.

    Returns:
        The artifact. What the stage raises is not caught.
    """
    registry = registry or default_registry()
    given = {name: [item] if isinstance(item, Artifact) else list(item) for name, item in (inputs or {}).items()}
    values: dict[str, Any] = copy.deepcopy(dict(config or {}))
    artifacts: dict[str, str] = {}
    for name, items in given.items():
        many = not isinstance((inputs or {})[name], Artifact)
        named = [f"{name}-{place}" for place in range(len(items))] if many else [name]
        _put(values, name, named if many else name)
        artifacts |= {text: str(item.path) for text, item in zip(named, items, strict=True)}
    use = registry.use("stage", {"uses": uses, **values})
    made = cast("StageConfig", use.config)
    sources = {path: values for path, _, values in references(made, Source) if values}
    made = made.resolved(sources, registry)
    kinds: dict[str, list[ArtifactKind]] = {path: [item.kind for item in items] for path, items in given.items()}
    kinds = {path: [] for path, _, _ in references(made, Input)} | kinds
    key = digest_value(
        {
            "stage": uses,
            "config": made.model_dump(mode="json"),
            "seed": seed,
            "date": str(date),
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
        artifacts=artifacts,
        kinds=kinds,
        sources={value: value for values in sources.values() for value in values},
        seed=seed,
        key=key,
        out=str(work / "out"),
        scratch=str(work),
        run="alone",
        recipe="alone",
        tracking=str(store.tracking("alone", uses, key)),
        store=str(store.root),
        trackers=[],
        date=None if date is None else date.isoformat(),
    )
    context = JobContext(job, registry, _Listener())
    stage = registry.build(Use(use.component, made), context)
    seed_everything(seed)
    facts = stage.run()
    check_facts(facts, made.produces(kinds), str(registry.provider(use.component)))
    about = {
        "stage": uses,
        "facts": facts,
        "warnings": context.warnings,
        "inputs": {name: [item.key for item in items] for name, items in given.items()},
    }
    return commit(store, key, made.produces(kinds), work / "out", about)


class TestContext(PluginAccess):
    """The context of a component in its author's tests: artifacts and files by the values that configs name them with.

    Args:
        scratch: A folder.
        artifacts: Artifacts by value.
        paths: Files by value.
        seed: The seed.
    """

    __test__ = False
    stage = "test"
    date: datetime.date | None = None
    rank = 0
    world = 1
    preview = 0
    device = "cpu"

    def __init__(
        self,
        scratch: Path | None = None,
        artifacts: Mapping[str, Artifact] | None = None,
        paths: Mapping[str, Path] | None = None,
        *,
        seed: int = 0,
        registry: Registry | None = None,
    ) -> None:
        super().__init__(registry or default_registry())
        self.seed = seed
        self._folder = None if scratch else tempfile.TemporaryDirectory()
        self.scratch = scratch or Path(cast("Any", self._folder).name)
        self.out = self.scratch / "out"
        self.cache = self.scratch / "cache"
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self._artifacts = dict(artifacts or {})
        self._paths = dict(paths or {})

    def artifact(self, value: str | None) -> Artifact:
        """The artifact that was given for a value."""
        return self._artifacts[str(value)]

    def path(self, value: str) -> Path:
        """The file that was given for a value."""
        return self._paths[value]

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        """Nothing is shown."""

    def log(self, message: str) -> None:
        """Kept in `messages`."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Kept in `warnings`."""
        self.warnings.append(message)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing is shown."""

    def finished(self, path: Path) -> None:
        """Nothing is hashed."""

    def stopping(self) -> bool:
        """Never asked to stop."""
        return False


def _put(values: Any, path: str, value: Any) -> None:
    """Set the value at a path such as ``slices.0.sources.1.model``."""
    *parents, last = path.split(".")
    for part in parents:
        values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
    values[last] = value


def tiny_dataset(
    folder: Path,
    rows: Sequence[Row] | None = None,
    *,
    split: Split = "train",
    validation: Sequence[Row] = (),
    test: Sequence[Row] = (),
) -> Artifact:
    """A dataset artifact of these rows; by default three short texts.

    Args:
        folder: A store.
        rows: Rows of one schema.
        split: Where they go.
        validation: Rows that are held out beside them.
        test: The same, for tests.
    """
    rows = list(rows or [{"text": text} for text in TEXTS])
    schema = _schema_of(rows[0])
    held_out: dict[Split, Sequence[Row]] = {"validation": list(validation), "test": list(test)}
    splits: dict[Split, Sequence[Row]] = {split: rows, **{name: part for name, part in held_out.items() if part}}
    key = digest_value({"rows": rows, "split": split, **held_out})
    store = Store(folder)
    if store.find(key) is None:
        out = store.work(key) / "out"
        out.mkdir(parents=True, exist_ok=True)
        for name, part in splits.items():
            write_split(out, name, part)
        facts = dataset_facts(schema, splits, {})
        commit(store, key, "dataset", out, {"stage": "data", "facts": facts, "warnings": [], "inputs": {}})
    return Artifact.load(store.folder(key))


def resealed(folder: Path, **facts: Any) -> Artifact:
    """An artifact whose files were changed on purpose, such as to see what is said of them: its manifest names them as
    they are now. Without that, it counts as damaged.

    Args:
        folder: The artifact's folder.
        **facts: Facts to change.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["facts"] |= facts
    manifest["files"] = {
        str(path.relative_to(folder)): {"sha256": digest_file(path), "size": path.stat().st_size}
        for path in files_in(folder)
        if path.name != MANIFEST
    }
    manifest[CHECKSUM] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Artifact.load(folder)


def _schema_of(row: Row) -> Schema:
    """The schema whose columns a row has, the one with the most of them."""
    fitting: list[Schema] = [schema for schema in SCHEMAS if set(COLUMNS[schema]) <= set(row)]
    return max(fitting, key=lambda schema: len(COLUMNS[schema]))


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
