"""Refuses to train on what is tested on, and to test on what was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import Artifact
from luthier.api.config import Input, StageConfig, references
from luthier.api.context import Context
from luthier.api.errors import DataError, LuthierError
from luthier.artifacts.digest import digest_value
from luthier.data.leakage import REVISION, Leakage, leakage
from luthier.registry import Registry

SHOWN = 3
"""Leaks that an error shows."""


def check_leakage(config: StageConfig, tests: Mapping[str, str], registry: Registry, context: Context) -> None:
    """Compare what a stage trains on with what the recipe tests on, or what it tests on with all that its model was
    trained on.

    Args:
        config: The stage's config.
        tests: See `luthier.worker.job.Job`.
        registry: Where stages are looked up.
        context: The stage's context.

    Raises:
        DataError: rows are both, and the config does not say why they may be; shows the worst side by side.
    """
    for stage, folder in tests.items():
        _check(_named(config, config.learns_from, context), Artifact.intact(Path(folder)), config, context, stage)
    for tested in _named(config, config.measures_on, context):
        trained = {data.key: data for model in _models(config, context) for data in _learned(model, registry)}
        _check(list(trained.values()), tested, config, context, context.stage)


def _named(config: StageConfig, fields: Sequence[str], context: Context) -> list[Artifact]:
    values = [getattr(config, field) for field in fields]
    listed = [cast("list[str]", value) if isinstance(value, list) else [value] for value in values if value is not None]
    return context.artifacts([value for some in listed for value in some])


def _check(trained: Sequence[Artifact], tested: Artifact, config: StageConfig, context: Context, stage: str) -> None:
    if not trained or not tested.facts["rows"].get("test"):
        return
    found = _found(trained, tested, context)
    if not found.leaking:
        return
    text = "\n".join(
        [f"{found.leaking} of the {found.rows} rows that '{stage}' tests on are trained on:", *_shown(found)]
    )
    if config.leakage_allowed is None:
        raise DataError(
            text,
            hint='test on other rows, or take these out of training; `allow_leakage: "why"` lets it be, and the '
            "manifest says so",
        )
    context.warn(f"{text}\nallowed: {config.leakage_allowed}")


def _found(trained: Sequence[Artifact], tested: Artifact, context: Context) -> Leakage:
    """What leaks, as it was found before or anew."""
    key = digest_value({"revision": REVISION, "trained": sorted(data.key for data in trained), "tested": tested.key})
    path = context.cache / "leakage" / f"{key}.json"
    if path.exists():
        return Leakage.from_json(json.loads(path.read_text(encoding="utf-8")))
    found = leakage(trained, tested, lambda done, total: context.progress(done, total, "rows compared with the tests"))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(f".{context.stage}")
    made.write_text(json.dumps(found.to_json()), encoding="utf-8")
    made.replace(path)
    return found


def _shown(found: Leakage) -> Iterator[str]:
    for leak in found.worst[:SHOWN]:
        yield f"  the {leak.part} ({leak.share:.0%})  tested  {leak.tested}: {leak.test_text}"
        yield f"  {'':{len(leak.part) + 11}}  trained {leak.trained}: {leak.train_text}"


def _models(config: StageConfig, context: Context) -> list[Artifact]:
    """What is measured."""
    named = [
        value for path, _, values in references(config, Input) if path not in config.measures_on for value in values
    ]
    return context.artifacts(named)


def _learned(model: Artifact, registry: Registry) -> Iterator[Artifact]:
    """All datasets that a model was trained on, as far as the store has them; but for those of which an earlier stage
    said why they may be tested on."""
    waiting, seen = [model], set[str]()
    while waiting:
        artifact = waiting.pop()
        if artifact.key in seen:
            continue
        seen.add(artifact.key)
        inputs: Mapping[str, Sequence[str]] = artifact.manifest["inputs"]
        taught = _taught_fields(artifact, registry)
        for field, keys in inputs.items():
            for parent in artifact.siblings(keys):
                if parent.kind != "dataset":
                    waiting.append(parent)
                elif field in taught:
                    yield parent


def _taught_fields(artifact: Artifact, registry: Registry) -> Sequence[str]:
    about: Mapping[str, Any] = artifact.manifest.get("component", {})
    if artifact.manifest.get("config", {}).get("allow_leakage") is not None:
        return ()
    try:
        found = registry.config_class(registry.get("stage", about.get("name", "")))
    # Made by a plugin that is not installed here, or from outside.
    except LuthierError:
        return ()
    return cast("type[StageConfig]", found).learns_from
