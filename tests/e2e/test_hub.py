"""Hub ids, answered from the hub's own local cache: pinned to a commit, and kept in the lock file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from luthier import Recipe, plan
from luthier.testing import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine that has downloaded `org/model` once."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = cache / "models--org--model"
    made = tiny_model(tmp_path / "made", hidden_size=32, layers=1)
    shutil.copytree(made.path, folder / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("manifest.json"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (tmp_path / "taken.yaml").write_text(
        "luthier: 1\nname: taken\nstages:\n  base: {uses: base, source: hf:org/model}\n"
    )
    return folder


def test_a_hub_model_is_pinned_and_taken(hub: Path, cli, tmp_path: Path) -> None:
    done = cli("run", "taken.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / "taken.lock.yaml").read_text()) == {"org/model": COMMIT}
    manifest = json.loads(cli("show", "taken/base", "--json").stdout)
    assert manifest["payload"]["sources"] == {"source": [f"hf:org/model@{COMMIT}"]}
    # The hub moves on; the recipe stays where it was pinned.
    (hub / "refs" / "main").write_text(OTHER)
    (node,) = plan(Recipe.load(tmp_path / "taken.yaml"), tmp_path / ".luthier").nodes.values()
    assert node.status == "cached"


def test_a_commit_in_the_recipe_needs_no_lock(hub: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(tmp_path / "taken.yaml", overrides=[f"stages.base.source=hf:org/model@{OTHER}"])
    (node,) = plan(recipe, tmp_path / "s").nodes.values()
    assert node.sources["source"][0].digest == f"hf:org/model@{OTHER}"
    assert not (tmp_path / "taken.lock.yaml").exists()


def test_a_model_that_is_nowhere_names_the_remedy(hub: Path, cli) -> None:
    done = cli("plan", "taken.yaml", "--set", "stages.base.source=hf:org/nothing")
    assert done.returncode == 2
    assert "the hub cannot say which commit 'org/nothing' is at" in done.stderr
    assert "give the path of a local folder" in done.stderr


def test_an_embedded_model_that_is_unknown_names_those_there_are(hub: Path, cli) -> None:
    done = cli("plan", "taken.yaml", "--set", "stages.base.source=embedded:nano-bass")
    assert done.returncode == 2
    assert "there are: nano-base" in done.stderr
