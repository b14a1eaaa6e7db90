"""Models and disks that cannot be used: named before anything is lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from luthier.artifacts.store import Store
from luthier.testing import tiny_model

RECIPE = "luthier: 1\nname: taken\nstages:\n  base: {uses: base, source: ./model}\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder beside a recipe that takes it."""
    shutil.copytree(tiny_model(tmp_path / "made", hidden_size=32, layers=1).path, tmp_path / "model")
    (tmp_path / "taken.yaml").write_text(RECIPE)
    return tmp_path / "model"


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickles_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(2)}, model / "pytorch_model.bin")


def cut_short(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])


def large_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": size + 5, "content": "<|new|>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    (model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("spoil", "message", "remedy", "code"),
    [
        # What headers say is known before anything is run.
        (no_weights, "has no weights (*.safetensors)", "is this a model folder?", 2),
        (pickles_only, "pickle files only (pytorch_model.bin)", "convert them to safetensors", 2),
        (cut_short, "where its header says", "copy or download it again", 2),
        (large_tokenizer, "tokens, the embedding only", "without resizing the embedding", 1),
        (no_tokenizer, "has no tokenizer", "copy the model's tokenizer files", 1),
    ],
)
def test_a_model_that_cannot_be_used(model: Path, cli, spoil, message: str, remedy: str, code: int) -> None:
    spoil(model)
    done = cli("run", "taken.yaml")
    assert done.returncode == code
    assert str(model) in done.stderr
    assert message in done.stderr
    assert remedy in done.stderr


def test_a_missing_folder_is_found_while_planning(tmp_path: Path, cli) -> None:
    (tmp_path / "taken.yaml").write_text(RECIPE)
    done = cli("run", "taken.yaml")
    assert done.returncode == 2
    assert "taken.yaml:4: stages.base.source: there is no file or folder './model'" in done.stderr


def test_a_full_disk_loses_nothing(recipe: Path, tmp_path: Path) -> None:
    """The limit on file sizes makes writes fail as a full disk does, in the worker and all libraries."""
    recipe.write_text(recipe.read_text().replace("count: 20", "count: 90000").replace("[100, 999]", "[1, 99999999]"))
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "small.yaml"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "luthier clean" in done.stderr
    store = Store.at(tmp_path / ".luthier")
    assert [artifact.manifest["stage"] for artifact in store] == ["chats"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "chats  = cached" in again.stdout
