"""Keys: what is part of them, what is not, and that they stay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import snapshots
from inline_plugins import OnePlugin
from luthier.api import Config, Field, NotIdentity, PluginError
from luthier.api.config import identity
from luthier.planning import plan
from luthier.recipe import Recipe
from luthier.registry import Provider, Registry, default_registry


def test_a_changed_default_raises_the_components_revision() -> None:
    known, now = json.loads(snapshots.DEFAULTS.read_text()), snapshots.component_defaults()
    changed = []
    for name, about in known.items():
        defaults = {
            key: value for key, value in now.get(name, {}).get("defaults", {}).items() if key in about["defaults"]
        }
        if name in now and defaults != about["defaults"] and now[name]["revision"] <= about["revision"]:
            changed.append(name)
    assert not changed, (
        f"the defaults of {', '.join(changed)} changed and the revision did not: artifacts that were made with the old "
        "ones would count as made with the new. Raise `revision` of the component, then run "
        "`python tests/snapshots.py`"
    )
    assert now == known, "a field or a component is new: run `python tests/snapshots.py`"


def test_the_quickstarts_keys_are_what_they_were() -> None:
    known = json.loads(snapshots.KEYS.read_text())
    assert snapshots.quickstart_keys() == known, (
        "the keys of the quickstart changed, and with them those of every user: all that they trained would be made "
        "again. If a component gives another result now, its revision has risen, and that is on purpose: run "
        "`python tests/snapshots.py`. If not, find what got into the keys"
    )


class Old(Config):
    """A config as it was."""

    size: int = 3
    """A size."""
    name: str
    """A name."""


class New(Old):
    """The same with more fields."""

    more: float = 0.5
    """A new field."""
    method: Annotated[Any, None] = None
    """Another one."""
    rules: list[str] = []
    """One more."""


def test_a_new_field_with_a_default_keeps_the_key() -> None:
    registry = default_registry()
    assert identity(Old(name="x"), registry) == identity(New(name="x"), registry) == {"name": "x"}
    assert identity(New(name="x", more=0.6, size=3), registry) == {"name": "x", "more": 0.6}


def test_every_default_of_every_component_is_left_out() -> None:
    registry = default_registry()
    for component, _ in registry:
        config_class = registry.config_class(component)
        required = {name for name, field in config_class.model_fields.items() if field.is_required()}
        # A merge needs `models` or `slices`, a filter a rule or a judge, though none alone is required.
        if not required and component.name not in ("merge", "filter"):
            made = config_class.model_validate({}, context={"components": registry})
            assert identity(made, registry) == {}, f"{component.kind} {component.name}"


def stage(registry: Registry, **values: Any) -> Any:
    return registry.use("stage", {"uses": "sft", "model": "m", "data": "d", **values}).config


class Plain(Config):
    """Nothing to choose."""


class NoObjective:
    """Never made."""


def with_revision(revision: int) -> Registry:
    """The installed plugins, with an objective of this revision."""
    from luthier.api import ObjectiveConfig

    registry = Registry.installed()
    plugin = OnePlugin("objective", "mine", ObjectiveConfig, NoObjective, revision=revision)
    registry.add(plugin, Provider("t", "t", "1"))
    return registry


def test_a_default_component_is_seen_once_its_revision_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.api import TuningConfig

    monkeypatch.setattr(TuningConfig.model_fields["objective"], "default", "mine")
    for revision, expected in ((1, {}), (2, {"objective": {"uses": "mine", "revision": 2, "config": {}}})):
        registry = with_revision(revision)
        config = TuningConfig.model_validate(
            {"model": "m", "data": "d", "objective": "mine"}, context={"components": registry}
        )
        assert identity(config, registry) == expected


def test_devices_micro_batches_and_logging_are_no_identity() -> None:
    registry = default_registry()
    same = {"micro_batch_size": 4, "log_every": 1, "save_every": 3, "gradient_checkpointing": True, "seed": 9,
            "resources": {"gpus": 1}, "after": ["x"]}  # fmt: skip
    assert identity(stage(registry), registry) == identity(stage(registry, **same), registry) == {}
    assert identity(stage(registry, batch_size=16), registry) == {"batch_size": 16}


class Odd(Config):
    """Holds what cannot be hashed."""

    model_config = {"arbitrary_types_allowed": True}

    thing: Any = SimpleNamespace()
    """Not a plain value."""
    where: Annotated[str, NotIdentity()] = Field(default="here")
    """No identity."""


def test_what_cannot_be_hashed_is_refused() -> None:
    with pytest.raises(PluginError, match="holds SimpleNamespace, which cannot be part of a key"):
        identity(Odd(), default_registry())


RECIPE: dict[str, Any] = {
    "luthier": 1,
    "stages": {
        # With its own seed, because it deals out rows.
        "chats": {"uses": "data", "source": "chats.jsonl", "seed": 3},
        "base": {"uses": "base"},
        "one": {"uses": "sft", "model": "base", "data": "chats"},
        "two": {"uses": "sft", "model": "base", "data": "chats", "seed": 1},
        "same": {"uses": "sft", "model": "base", "data": "chats", "seed": 0},
        "soup": {"uses": "merge", "models": ["one", "two"]},
    },
}


def test_a_stages_own_seed_is_in_its_key(tmp_path: Path, chats: Path) -> None:
    nodes = plan(Recipe.from_mapping(RECIPE, folder=tmp_path), tmp_path / "s").nodes
    assert nodes["one"].key != nodes["two"].key
    assert nodes["one"].key == nodes["same"].key, "0 is the recipe's seed"
    other = plan(Recipe.from_mapping({**RECIPE, "seed": 5}, folder=tmp_path), tmp_path / "s").nodes
    assert other["two"].key == nodes["two"].key
    assert other["one"].key != nodes["one"].key
    assert other["base"].key == nodes["base"].key, "copying a model draws no numbers"


def test_a_recognised_format_is_in_plan_and_key(tmp_path: Path, chats: Path) -> None:
    told = {**RECIPE, "stages": {"chats": {"uses": "data", "source": "chats.jsonl", "format": "messages"}}}
    guessed = {**RECIPE, "stages": {"chats": {"uses": "data", "source": "chats.jsonl"}}}
    keys = []
    for recipe in (told, guessed):
        node = plan(Recipe.from_mapping(recipe, folder=tmp_path), tmp_path / "s").nodes["chats"]
        assert node.payload["config"]["format"] == {"uses": "messages", "revision": 1, "config": {}}
        keys.append(node.key)
    assert keys[0] == keys[1]


def test_a_new_input_that_names_nothing_keeps_the_key(tmp_path: Path, chats: Path) -> None:
    node = plan(Recipe.from_mapping(RECIPE, folder=tmp_path), tmp_path / "s").nodes["soup"]
    assert set(node.inputs) > {"models"}, "a merge has optional inputs"
    assert list(node.payload["inputs"]) == ["models"]
    assert node.payload["sources"] == {}


def test_an_evaluation_that_draws_answers_has_the_seed_in_its_key(tmp_path: Path, chats: Path) -> None:
    stages = {
        "held": {"uses": "data", "source": "chats.jsonl", "split": "test"},
        "base": {"uses": "base"},
        "report": {"uses": "evaluate", "model": "base", "data": "held"},
    }
    keys = [
        plan(Recipe.from_mapping({"luthier": 1, "seed": seed, "stages": stages}, folder=tmp_path), tmp_path / "s")
        .nodes["report"]
        .payload["seed"]
        for seed in (1, 2)
    ]
    assert keys == [1, 2]


@pytest.mark.parametrize("seed", [-1, 2**32, "x"])
def test_a_seed_out_of_range_is_refused(tmp_path: Path, chats: Path, seed: Any) -> None:
    from luthier.api import RecipeError

    stages = {"chats": {"uses": "data", "source": "chats.jsonl", "seed": seed}}
    with pytest.raises(RecipeError, match="seed"):
        Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=tmp_path)
