"""mergekit's YAML files run as they are, and give what mergekit gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from luthier import Recipe
from luthier.api import Artifact, ModelError, RecipeError
from luthier.merging.check import check
from luthier.merging.config import MergeConfig
from luthier.merging.engine import Engine, Settings
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.mergekit_yaml import (
    EPSILON_PER_MODEL,
    FALLBACKS,
    IGNORED,
    MORE,
    PER_MODEL,
    WEIGHTED,
    as_config,
)
from luthier.merging.mergekit_yaml import OURS as OURS_THERE
from luthier.merging.reader import Weights
from luthier.merging.writer import Output
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_model
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions
from safetensors.torch import load_file

SHAPE = {"dtype": "float32", "layers": 4, "tied": False}
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
    "stacked changes": """\
slices:
  - sources:
      - {model: ./base, layer_range: [0, 3]}
      - {model: ./a, layer_range: [0, 3], parameters: {weight: 1}}
  - sources:
      - {model: ./base, layer_range: [1, 4]}
      - {model: ./a, layer_range: [1, 4], parameters: {weight: 1}}
merge_method: task_arithmetic
base_model: ./base
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
    "module": """\
modules:
  default:
    models:
      - {model: ./a, parameters: {density: [{filter: mlp, value: 0.25}], weight: 0.5}}
      - {model: ./b, parameters: {weight: 0.5}}
    parameters: {density: [{filter: self_attn, value: 0.75}]}
merge_method: ties
base_model: ./base
parameters: {density: 0.5}
dtype: float32
""",
    "each slice its own base": """\
slices:
  - sources:
      - {model: ./base, layer_range: [0, 2]}
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 0.7}}
      - {model: ./b, layer_range: [0, 2], parameters: {weight: 0.4}}
  - sources:
      - {model: ./b, layer_range: [2, 4]}
      - {model: ./a, layer_range: [2, 4], parameters: {weight: 0.5}}
    base_model: ./b
    residual_weight: 0.5
merge_method: task_arithmetic
base_model: ./base
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
    "each slice its own": """\
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 2]}]
    parameters: {t: [0.0, 0.6]}
  - sources: [{model: ./b, layer_range: [2, 3]}, {model: ./a, layer_range: [1, 2]}]
    base_model: ./b
  - sources: [{model: ./a, layer_range: [3, 4]}, {model: ./b, layer_range: [3, 4]}]
    parameters: {t: [{filter: self_attn, value: 0.9}]}
merge_method: slerp
base_model: ./a
parameters: {t: 0.25}
dtype: float32
""",
    "each source its own": """\
slices:
  - sources:
      - {model: ./base, layer_range: [0, 2]}
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 1, density: 0.5}}
      - {model: ./b, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.9}}
    parameters: {lambda: 0.7}
  - sources:
      - {model: ./b, layer_range: [2, 4], parameters: {weight: 0.5}}
      - {model: ./base, layer_range: [1, 3]}
  - sources: [{model: ./base, layer_range: [3, 4]}]
merge_method: ties
base_model: ./base
parameters: {density: 0.25, weight: 1}
dtype: float32
""",
    "a layer of one source": """\
slices:
  - sources:
      - model: ./a
        layer_range: [1, 2]
        parameters: {scale: [{filter: layers.1.mlp.down_proj, value: 0}, {value: 1}]}
  - sources: [{model: ./b, layer_range: [0, 1]}]
merge_method: passthrough
dtype: float32
""",
    "a layer of one model": """\
slices:
  - sources:
      - {model: ./a, layer_range: [2, 4], parameters: {weight: [{filter: layers.3, value: 2}, {value: 0.5}]}}
      - {model: ./b, layer_range: [1, 3], parameters: {density: [{filter: layers.1, value: 0.25}, {value: 0.75}]}}
      - {model: ./base, layer_range: [2, 4]}
merge_method: ties
base_model: ./base
parameters: {weight: 1, density: 0.5}
dtype: float32
""",
    "beside a model": """\
models:
  - {model: ./a, parameters: {weight: 1, lambda: 0.5}}
  - {model: ./b, parameters: {weight: 1, normalize: true}}
merge_method: task_arithmetic
base_model: ./base
dtype: float32
""",
    "filters with a default": """\
models: [{model: ./a}, {model: ./b}]
merge_method: breadcrumbs
base_model: ./base
parameters:
  weight: 0.5
  density: 0.75
  lambda: [{filter: mlp, value: 0.5}]
  gamma: [{filter: self_attn, value: 0.1}]
dtype: float32
""",
    "filters that slices complete": """\
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 2]}]
    parameters: {t: [{filter: self_attn, value: 0.9}, {value: 0.2}]}
  - sources: [{model: ./a, layer_range: [2, 4]}, {model: ./b, layer_range: [2, 4]}]
    parameters: {t: 0.7}
merge_method: slerp
base_model: ./a
parameters: {t: [{filter: mlp, value: 0.5}]}
dtype: float32
""",
}
OURS = {
    "a layer of one source": "passthrough",
    "a layer of one model": "ties",
    "beside a model": "task_arithmetic",
    "filters with a default": "breadcrumbs",
    "filters that slices complete": "slerp",
    "each slice its own": "slerp",
    "each source its own": "ties",
    "stacked changes": "task_arithmetic",
    "doubled": "passthrough",
    "fallback": "ties",
    "linear": "linear",
    "slerp": "slerp",
    "ties": "ties",
    "stack": "passthrough",
    "stock": "model_stock",
    "rescaled": "mergekit",
    "nuslerp": "nuslerp",
    "module": "ties",
    "each slice its own base": "task_arithmetic",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three model folders."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in artifacts(folder).items():
        shutil.copytree(model.path, folder / name, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def by_mergekit(file: Path, out: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of a file."""
    content = yaml.safe_load(file.read_text().replace("./", f"{file.parent}/"))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(content), str(out), options)
    return {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_mergekit_gives(models: Path, tmp_path: Path, name: str) -> None:
    file = models / f"{name}.yml"
    file.write_text(FILES[name])
    registry = default_registry()
    config = MergeConfig.model_validate({"config": str(file)}, context={"components": registry})
    made = {str(models / label): Weights(artifact) for label, artifact in artifacts(models).items()}
    places = config.models or [source.model for part in config.slices for source in part.sources]
    own_bases = {place: made[part.base] for place, part in enumerate(config.slices) if part.base}
    inputs = Inputs([made[place] for place in places], made[config.base] if config.base else None, own_bases)
    check(config, inputs)
    layout = lay_out(config, inputs, 0, config.dtype)
    output = Output(tmp_path, layout.tensors, 1 << 30)
    method, *own = (
        registry.impl_class(use.component)(use.config, None)
        for use in (config.method, *config.methods_of_slices().values())
    )
    of_slice = dict(zip(config.methods_of_slices(), own, strict=True))
    jobs = [replace(job, method=of_slice.get(job.slice)) for job in layout.jobs]
    Engine(method, output, Settings(), lambda done, total: None).run(jobs)
    output.close()
    found, expected = load_file(tmp_path / "model.safetensors"), by_mergekit(file, tmp_path / "theirs")
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-5), key


def artifacts(folder: Path) -> dict[str, Artifact]:
    """The models as artifacts, by the name of their folder."""
    return {label: tiny_model(folder / "store", seed=seed, **SHAPE) for seed, label in enumerate(("base", "a", "b"))}


def test_the_command_line_takes_a_file(models: Path, tmp_path: Path, cli) -> None:
    file = models / "linear.yml"
    file.write_text(FILES["linear"])
    done = cli("do", "merge", f"config={file}", "--out", "ours")
    assert done.returncode == 0, done.stderr
    found, expected = load_file(tmp_path / "ours" / "model.safetensors"), by_mergekit(file, tmp_path / "theirs")
    assert all(torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-5) for key, tensor in found.items())


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_on_luthiers_own_method_where_there_is_one(models: Path, tmp_path: Path, name: str) -> None:
    file = models / f"{name}.yml"
    file.write_text(FILES[name])
    assert as_config({"config": str(file)}, None)["method"]["uses"] == OURS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": None}, "it has no merge_method"),
        ({"modules": {}, "models": None}, "`modules` of the mergekit file are none"),
        (
            {"modules": {"text": {}, "vision": {}}, "models": None},
            "are text, vision: Luthier merges models of one module",
        ),
        ({"modules": ["default"], "models": None}, "of the mergekit file are \\['default'\\]"),
        ({"modules": {"default": 3}, "models": None}, "is not valid for mergekit"),
        ({"modules": {"default": {}}}, "has `modules`, and `models` or `slices` beside them"),
        ({"modules": {"default": {}}, "models": None}, "has neither `models` nor `slices`"),
        ({"colour": "red"}, "has 'colour', which is not supported"),
        ({"models": [{"foo": 1}]}, "not a list of entries that have `model`"),
        ({"models": ["./a"]}, "not a list of entries that have `model`"),
        ({"dtype": "float64"}, "the dtype float64"),
        ({"tokenizer": {"source": "union", "colour": {}}}, "'colour', which is not supported"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "is forced, but not to any value"),
        ({"tokenizer": "union"}, "`tokenizer` of the mergekit file is not a mapping"),
        ({"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1}}]}, "needs a weight for every model"),
    ],
)
def test_what_cannot_be_done_is_said(models: Path, tmp_path: Path, change: dict, message: str) -> None:
    content = {key: value for key, value in (yaml.safe_load(FILES["linear"]) | change).items() if value is not None}
    (models / "odd.yml").write_text(yaml.safe_dump(content))
    recipe = {"luthier": 1, "stages": {"x": {"uses": "merge", "config": "odd.yml"}}}
    with pytest.raises(RecipeError, match=message.replace("+", r"\+")):
        Recipe.from_mapping(recipe, folder=models)


def test_what_mergekit_does_not_use_is_left_out_and_reported(models: Path, tmp_path: Path, cli) -> None:
    file = tmp_path / "odd.yml"
    file.write_text(
        f"models: [{{model: {models}/a}}, {{model: {models}/b}}]\nmerge_method: slerp\nbase_model: {models}/a\n"
        "parameters: {t: 0.25, normalize: true, weight: 3, int8_mask: true}\ndtype: float32\n"
    )
    config = as_config({"config": str(file)}, None)
    assert config["method"] == {"uses": "slerp", "t": 0.25}
    assert config["unused"] == ["normalize", "weight"]
    done = cli("do", "merge", f"config={file}", "--out", "made")
    assert done.returncode == 0, done.stderr
    assert "slerp does not use normalize, weight" in done.stdout + done.stderr
    found, expected = load_file(tmp_path / "made" / "model.safetensors"), by_mergekit(file, tmp_path / "theirs")
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-5), key


def test_a_weight_of_residuals_that_mergekit_does_not_use_is_reported(models: Path) -> None:
    (models / "residual.yml").write_text(FILES["each slice its own base"])
    assert as_config({"config": str(models / "residual.yml")}, None)["unused"] == ["residual_weight"]


def test_the_parameters_of_mergekits_methods_are_known() -> None:
    theirs = {method.spec.name: {item.name for item in method.spec.parameters} for method in registered_methods()}
    # Adding up task vectors that are not made sparse, it has these and does not use them.
    idle = {"task_arithmetic": {"density", "rescale"}}
    for name, parameters in OURS_THERE.items():
        weight = {"weight"} if name in WEIGHTED else set()
        known = set(parameters) | MORE.get(name, set()) | set(IGNORED) | weight | idle.get(name, set())
        assert theirs[name] - known == set(), name
        assert (set(parameters) | MORE.get(name, set())) <= theirs[name], name


def test_parameters_are_searched_where_mergekit_searches_them(models: Path) -> None:
    scopes = {method.spec.name: {item.name: item for item in method.spec.parameters} for method in registered_methods()}
    for name, parameters in OURS_THERE.items():
        for theirs, ours in parameters.items():
            about = scopes[name][theirs]
            beside = theirs in PER_MODEL or (theirs == "epsilon" and name in EPSILON_PER_MODEL)
            assert beside == (about.scope.value != "shared"), (name, theirs)
            if ours in FALLBACKS and about.default is not None and isinstance(about.default, float):
                assert FALLBACKS[ours] == about.default, (name, theirs)
    file = models / "beside.yml"
    file.write_text(FILES["beside a model"])
    assert as_config({"config": str(file)}, None)["unused"] == ["lambda", "normalize"]


def test_the_words_of_mergekit_files_mean_what_they_mean_there(models: Path) -> None:
    def translated(text: str) -> dict:
        file = models / "words.yml"
        file.write_text(text)
        return as_config({"config": str(file)}, None)

    a, b, base = (str(models / name) for name in ("a", "b", "base"))
    pair = "models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 1}}]\n"
    assert translated(pair + "merge_method: linear\ntokenizer_source: base\n")["tokenizer"] == a
    ties = translated(pair + "merge_method: ties\nbase_model: ./base\ntokenizer_source: base\ndtype: torch.bfloat16\n")
    assert (ties["tokenizer"], ties["base"], ties["dtype"]) == (base, base, "bfloat16")
    # Such methods do not look at a base: it is one of the models.
    karcher = translated("models: [{model: ./a}, {model: ./b}]\nmerge_method: karcher\nbase_model: ./base\n")
    assert karcher["models"] == [base, a, b]
    assert "base" not in karcher
    words = translated(
        pair + "merge_method: linear\nchat_template: auto\ntokenizer: {tokens: {x: {}, y: {source: ./b}}}\n"
    )
    assert (words["tokenizer"], words["chat_template"]) == ("union", "auto")
    assert words["tokens"] == [{"token": "x"}, {"token": "y", "model": b}]
    mapped = translated(
        "models: [{model: {model: {path: ./a}, lora: {path: ./b}}, parameters: {weight: 1}}]\nmerge_method: linear\n"
    )
    assert mapped["models"] == [f"{a}+{b}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{model: ./gone, parameters: {weight: 1}}]\nmerge_method: linear\n", "there is no folder './gone'"),
        ("models: [{model: /a/b/c, parameters: {weight: 1}}]\nmerge_method: linear\n", "there is no folder '/a/b/c'"),
        ("slices: []\nmerge_method: linear\n", "is not valid for mergekit"),
        ("models: [{model: ./a, parameters: [1]}]\nmerge_method: linear\n", "is not valid for mergekit|dictionary"),
        ("models: [{model: ./a}]\nmerge_method: linear\nparameters: 3\n", "is not valid for mergekit"),
    ],
)
def test_odd_mergekit_files_are_messages(models: Path, text: str, message: str) -> None:
    (models / "odd.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        as_config({"config": str(models / "odd.yml")}, None)


def test_methods_of_third_parties_are_imported(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_methods.py").write_text(
        "import torch\nfrom mergekit.merge_methods import TensorGroup, merge_method, register\n"
        "@merge_method(name='first_of_all', pretty_name='First')\n"
        "def first_of_all(group: TensorGroup) -> torch.Tensor:\n"
        "    return group.non_base[0].tensor * 2\n"
        "register(first_of_all)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    two = list(artifacts(tmp_path).values())[:2]
    method = {"uses": "mergekit", "name": "first_of_all", "module": "somebodys_methods"}
    merged = run_stage(tmp_path / "s", "merge", {"method": method, "dtype": "float32"}, inputs={"models": two})
    found, first = (load_file(item.path / "model.safetensors") for item in (merged, two[0]))
    assert all(torch.equal(tensor, 2 * first[name]) for name, tensor in found.items())
    with pytest.raises(ModelError, match="the module nobodys_methods cannot be imported"):
        run_stage(tmp_path / "s", "merge", {"method": {**method, "module": "nobodys_methods"}}, inputs={"models": two})
