"""Hub ids, answered from the hub's own local cache: pinned to a commit, and kept in the lock file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
import yaml
from luthier import Recipe, plan
from luthier.artifacts.datasets import read_split
from luthier.artifacts.store import Store
from luthier.testing import tiny_model
from pyarrow import parquet

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


# -- datasets --------------------------------------------------------------------------------------

CARD = """\
---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: "main/*.parquet"}, {split: test, path: main/held-out/0.parquet}]
- config_name: small
  data_files: [{split: train, path: small.parquet}]
---
Rows.
"""
READS = """\
luthier: 1
name: reads
stages:
  rows: {uses: data, source: hf:org/rows, format: prompt_completion, columns: {question: prompt, answer: completion}}
"""


def written(path: Path, *questions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": question, "answer": "yes"} for question in questions]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def rows(hub: Path, tmp_path: Path) -> Path:
    """The cache of a machine that has downloaded the dataset `org/rows` once."""
    folder = hub.parent / "datasets--org--rows"
    snapshot = folder / "snapshots" / COMMIT
    written(snapshot / "main" / "0.parquet", "one?", "two?")
    written(snapshot / "main" / "1.parquet", "three?")
    written(snapshot / "main" / "held-out/0.parquet", "four?")
    written(snapshot / "small.parquet", "five?")
    (snapshot / "README.md").write_text(CARD)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (tmp_path / "reads.yaml").write_text(READS)
    return folder


def asked_in(folder: Path) -> list[str]:
    artifact = Store(folder / ".luthier").resolve("reads/rows")
    return [row["prompt"][0]["content"] if "prompt" in row else row["messages"][0]["content"]
            for row in read_split(artifact, "train")]  # fmt: skip


def test_a_dataset_is_pinned_and_read_as_its_card_says(rows: Path, cli, tmp_path: Path) -> None:
    done = cli("run", "reads.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / "reads.lock.yaml").read_text()) == {"datasets/org/rows": COMMIT}
    assert asked_in(tmp_path) == ["one?", "two?", "three?"]
    manifest = json.loads(cli("show", "reads/rows", "--json").stdout)
    assert manifest["payload"]["sources"] == {"source": [f"hf:datasets/org/rows@{COMMIT}"]}
    (rows / "refs" / "main").write_text(OTHER)
    assert plan(tmp_path / "reads.yaml", tmp_path / ".luthier").nodes["rows"].status == "cached"
    settings = {"{split: test}": ["four?"], "{config: small}": ["five?"], "{split: 'train[:2]'}": ["one?", "two?"]}
    for setting, questions in settings.items():
        done = cli("run", "reads.yaml", "--set", f"stages.rows.hub={setting}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert asked_in(tmp_path) == questions


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("stages.rows.hub={split: nothing}", 1, "split nothing"),
        ("stages.rows.hub={config: nothing}", 1, "configuration nothing"),
        ("stages.rows.format=null", 2, "what is in hf:org/rows is not read to plan a recipe"),
        ("stages.rows.source=hf:org/none", 2, "the hub cannot say which commit 'datasets/org/none' is at"),
    ],
)
def test_what_is_not_there_is_an_error(rows: Path, cli, setting: str, code: int, message: str) -> None:
    done = cli("run", "reads.yaml", "--set", setting)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
