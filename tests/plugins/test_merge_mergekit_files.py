"""mergekit's YAML files run as they are, and give what mergekit gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from luthier import Recipe
from luthier.api import RecipeError
from luthier.testing import tiny_model
from luthier_plugins.merge.mergekit_yaml import as_config
from safetensors.torch import load_file

FILES = {
    "linear": """\
models:
  - {model: ./a, parameters: {weight: 1.0}}
  - {model: ./b, parameters: {weight: [0.0, 2.0]}}
merge_method: linear
dtype: float32
""",
    "slerp": """\
slices:
  - sources:
      - {model: ./a, layer_range: [0, 4]}
      - {model: ./b, layer_range: [0, 4]}
merge_method: slerp
base_model: ./a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "ties": """\
models:
  - model: ./base
  - {model: ./a, parameters: {density: 0.5, weight: 0.5}}
  - {model: ./b, parameters: {density: 0.25, weight: 0.3}}
merge_method: ties
base_model: ./base
parameters: {normalize: true, int8_mask: true, lambda: 0.8}
dtype: float32
""",
    "stack": """\
slices:
  - sources: [{model: ./a, layer_range: [0, 3]}]
  - sources: [{model: ./b, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
""",
    "doubled": """\
slices:
  - sources: [{model: ./a, layer_range: [0, 3]}]
  - sources:
      - model: ./b
        layer_range: [2, 4]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.5}, {value: 1}]}
merge_method: passthrough
dtype: float32
""",
    "fallback": """\
models:
  - {model: ./a, parameters: {density: [{filter: mlp, value: 0.25}], weight: [{filter: mlp, value: 0.3}]}}
  - {model: ./b, parameters: {weight: 0.5}}
merge_method: ties
base_model: ./base
parameters: {density: 0.5, weight: 0.25}
dtype: float32
""",
    "stock": """\
models: [{model: ./a}, {model: ./b}]
merge_method: model_stock
base_model: ./base
dtype: float32
""",
    "rescaled": """\
models:
  - {model: ./a, parameters: {density: 0.5, weight: 1}}
  - {model: ./b, parameters: {density: 0.5, weight: 1}}
merge_method: ties
base_model: ./base
parameters: {rescale: true}
dtype: float32
""",
    "nuslerp": """\
models:
  - {model: ./a, parameters: {weight: 0.3}}
  - {model: ./b, parameters: {weight: 0.7}}
merge_method: nuslerp
base_model: ./base
dtype: float32
""",
}
OURS = {"doubled": "passthrough", "fallback": "ties", "linear": "linear", "slerp": "slerp", "ties": "ties",
        "stack": "passthrough", "stock": "model_stock", "rescaled": "mergekit", "nuslerp": "nuslerp"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three model folders."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny_model(folder / "store", seed=seed, dtype="float32", layers=4, tied=False)
        shutil.copytree(model.path, folder / name, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_mergekit_gives(models: Path, tmp_path: Path, name: str) -> None:
    file = models / f"{name}.yml"
    file.write_text(FILES[name])
    theirs = tmp_path / "theirs"
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), file.name, str(theirs), "--no-copy-tokenizer"]
    subprocess.run(command, cwd=models, capture_output=True, check=True)
    main = [sys.executable, "-c", "from luthier.cli.main import main; main()"]
    ours = tmp_path / "ours"
    arguments = ["do", "merge", f"config={file}", "--out", str(ours), "--store", str(tmp_path / "s")]
    done = subprocess.run([*main, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(ours / "model.safetensors")
    expected = {key: tensor for path in theirs.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_on_luthiers_own_method_where_there_is_one(models: Path, tmp_path: Path, name: str) -> None:
    file = models / f"{name}.yml"
    file.write_text(FILES[name])
    assert as_config({"config": str(file)}, None)["method"]["uses"] == OURS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": None}, "it has no merge_method"),
        ({"modules": {}}, "`modules` of mergekit files are not supported"),
        ({"colour": "red"}, "has 'colour', which is not supported"),
        ({"models": [{"model": "a+lora"}]}, "name an adapter's own folder"),
        ({"models": [{"foo": 1}]}, "no list of entries that have `model`"),
        ({"models": ["./a"]}, "no list of entries that have `model`"),
        ({"dtype": "float64"}, "the dtype float64"),
        ({"tokenizer": {"source": "union", "tokens": {}}}, "'tokens', which is not supported"),
        ({"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1}}]}, "needs a weight for every model"),
    ],
)
def test_what_cannot_be_done_is_said(models: Path, tmp_path: Path, change: dict, message: str) -> None:
    content = {key: value for key, value in (yaml.safe_load(FILES["linear"]) | change).items() if value is not None}
    (models / "odd.yml").write_text(yaml.safe_dump(content))
    recipe = {"luthier": 1, "stages": {"x": {"uses": "merge", "config": "odd.yml"}}}
    with pytest.raises(RecipeError, match=message.replace("+", r"\+")):
        Recipe.from_mapping(recipe, folder=models)
