"""The merge stage: what it writes, what it refuses, and that nothing about how it works changes a bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import Recipe, plan, run
from luthier.api import Artifact, ModelError, Needs, StoreError
from luthier.artifacts.datasets import read_split
from luthier.artifacts.models import NO_TOKENIZER, VOCABULARY_FILES
from luthier.merging import load_check
from luthier.merging import parts as merging_parts
from luthier.merging.api import MergePart
from luthier.merging.check import check_same, rope_of
from luthier.merging.config import MergeConfig
from luthier.merging.engine import Engine, Settings
from luthier.merging.files import DTYPES, Scratch
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.reader import Weights
from luthier.merging.verify import Verifier, check_index
from luthier.merging.writer import Described, Output
from luthier.modeling.loading import fold, load_model, load_tokenizer
from luthier.modeling.samples import measured
from luthier.modeling.text import encode_text
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier_plugins.merge_methods import selection
from luthier_plugins.merge_methods.linear import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)
CHATS = [{"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}]}] * 8
NAME = "model.layers.0.mlp.up_proj.weight"


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1
    ),
    st.integers(1, 400),
)
def test_files_written_in_any_order_are_what_safetensors_reads(tmp_path_factory, tensors: dict, limit: int) -> None:
    folder = tmp_path_factory.mktemp("f")
    described = {name: Described(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    values = {name: torch.randn(about.shape) for name, about in described.items()}
    output = Output(folder, described, limit)
    for name in reversed(described):
        flat = values[name].flatten()
        for start in range(0, flat.numel(), 3):
            output.write(name, start, flat[start : start + 3], Scratch())
    output.close()
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(found) == set(values)
    for name, tensor in found.items():
        assert torch.equal(tensor, values[name].to(DTYPES[described[name].dtype]))
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(list(folder.glob("*.safetensors"))) > 1)
    assert not index.exists() or set(json.loads(index.read_text())["weight_map"]) == set(values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def models(store: Path) -> list[Artifact]:
    """Three models with other weights, stored in bfloat16."""
    return [tiny_model(store, seed=seed, dtype="bfloat16") for seed in range(3)]


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return {name: tensor for path in artifact.path.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_soup_is_the_mean_in_the_dtype_of_the_first(store: Path, models: list[Artifact]) -> None:
    merged = run_stage(store, "merge", inputs={"models": models[:2]})
    one, two, soup = weights(models[0]), weights(models[1]), weights(merged)
    assert merged.facts["dtype"] == "BF16"
    assert merged.facts["proof"] == {"loaded": "memory", "forward": "finite"}
    for fact in ("tokenizer", "chat_template", "stop_tokens", "stop_token_ids"):
        assert merged.facts[fact] == models[0].facts[fact], "template, tokenizer and stop tokens are carried"
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, ((one[name].float() + two[name].float()) / 2).to(torch.bfloat16))


def merged_by(
    folder: Path, models: list[Artifact], base: Artifact | None, values: dict, seed: int = 0, **settings: int
) -> dict[str, torch.Tensor]:
    """What the engine makes, with no stage around it."""
    registry = default_registry()
    context = {"components": registry}
    given = {"models": ["m"] * len(models), "method": values, "dtype": "float32", **({"base": "b"} if base else {})}
    config = MergeConfig.model_validate(given, context=context)
    method = registry.impl_class(config.method.component)(config.method.config, None)
    inputs = Inputs([Weights(model) for model in models], Weights(base) if base else None)
    layout = lay_out(config, inputs, seed, config.dtype)
    # Loaded tensors are views of the file: each run has one of its own.
    folder = Path(tempfile.mkdtemp(dir=folder))
    output = Output(folder, layout.tensors, 1 << 30)
    Engine(method, output, Settings(**settings), lambda done, total: None).run(layout.jobs)
    output.close()
    return load_file(folder / "model.safetensors")


WITHOUT_DATA = sorted(set(default_registry().names("merge")) - {"fisher", "regmean", "mergekit"})
OWN_SETTINGS = {
    "ties": {"density": 0.3},
    "sce": {"density": 0.4},
    "nuslerp": {"flatten": False},
    "model_stock": {"filter_wise": True},
    "ram": {"r": 0.5},
}


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_same_bits_for_any_number_of_workers_and_any_chunk(
    tmp_path: Path, models: list[Artifact], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_parts, "BLOCK", 1000)
    registry = default_registry()
    asks: Any = registry.config_class(registry.get("merge_method", name))
    given_models = models[: 1 if asks.models == (1, 1) else 2]
    base = None if asks.base == "unused" else models[2]
    values = {"uses": name, **OWN_SETTINGS.get(name, {})}
    first = merged_by(tmp_path, given_models, base, values, workers=1, chunk=1 << 21)
    # Small chunks split most tensors among the workers, and what is split is not held in memory to select from.
    monkeypatch.setattr(selection, "IN_MEMORY", 0)

    @settings(max_examples=3, deadline=None)
    @given(st.sampled_from([1, 2, 4]), st.integers(1, 8000))
    def same(workers: int, chunk: int) -> None:
        other = merged_by(tmp_path, given_models, base, values, workers=workers, chunk=chunk)
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())

    same()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_workers_stand_back_from_wherever_they_are_and_nobody_else_does(
    tmp_path: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    merge = Linear.merge

    def watched(self: Linear, part: MergePart) -> torch.Tensor:
        seen.add(os.getpriority(os.PRIO_PROCESS, 0))
        return merge(self, part)

    monkeypatch.setattr(Linear, "merge", watched)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    merged_by(tmp_path, models[:2], None, {"uses": "linear"}, workers=2, niceness=5)

    def from_further_back() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, before + 7))
        merged_by(tmp_path, models[:2], None, {"uses": "linear"}, workers=2, niceness=5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(from_further_back).result()
    # No process can stand further back than 19.
    assert seen == {min(19, before + 5), min(19, before + 12)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_random_masks_follow_the_model_and_not_its_place(tmp_path: Path, models: list[Artifact]) -> None:
    values = {"uses": "dare_linear", "density": 0.5}
    there = merged_by(tmp_path, models[:2], models[2], values)
    back = merged_by(tmp_path, models[1::-1], models[2], values)
    for name, tensor in there.items():
        torch.testing.assert_close(tensor, back[name])
    again = merged_by(tmp_path, models[:2], models[2], values, seed=1)
    assert not torch.equal(again[NAME], there[NAME])


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, store: Path, models: list[Artifact]) -> Artifact:
    """A trained adapter on the first model."""
    config = {"adapter": {"uses": request.param, "r": 4}, "steps": 4, "learning_rate": 0.05}
    data = tiny_dataset(store, CHATS)
    return run_stage(store, "sft", config, inputs={"model": models[0], "data": [data]})


def test_an_adapter_is_added_as_peft_folds_it(store: Path, models: list[Artifact], adapter: Artifact) -> None:
    config = {"method": "passthrough", "dtype": "float32"}
    merged = weights(run_stage(store, "merge", config, inputs={"models": [adapter]}))
    folded = fold(load_model(adapter)).state_dict()
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, weights(models[0])[name].float())
    assert changed >= 14, "every linear layer of both layers is tuned"


def test_slices_stack_layers_of_several_models(store: Path, models: list[Artifact]) -> None:
    config = {"method": "passthrough", "slices": [{"sources": [{"layers": [0, 2]}]}, {"sources": [{"layers": [1, 2]}]}]}
    inputs = {"slices.0.sources.0.model": models[0], "slices.1.sources.0.model": models[1]}
    merged = run_stage(store, "merge", config, inputs=inputs)
    assert json.loads((merged.path / "config.json").read_text())["num_hidden_layers"] == 3
    tensors = weights(merged)
    third = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(tensors[third], weights(models[1])["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(tensors["model.norm.weight"], weights(models[1])["model.norm.weight"])
    assert torch.equal(tensors["model.embed_tokens.weight"], weights(models[0])["model.embed_tokens.weight"])


def test_gradients_and_filters_weigh_layers_apart(store: Path, models: list[Artifact]) -> None:
    mixed = [[1, 0], [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]]
    merged = weights(run_stage(store, "merge", {"weights": mixed, "dtype": "float32"}, inputs={"models": models[:2]}))
    one, two = weights(models[0]), weights(models[1])
    first, last = NAME, NAME.replace("layers.0", "layers.1")
    assert torch.equal(merged[first], one[first].float())
    torch.testing.assert_close(merged[last], two[last].float())
    query = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[query], (one[query].float() + two[query].float()) / 2)


def test_shards_have_an_index_and_load(store: Path, models: list[Artifact]) -> None:
    merged = run_stage(store, "merge", {"shard_size": 50_000}, inputs={"models": models[:2]})
    assert len(list(merged.path.glob("model-*-of-*.safetensors"))) > 2
    whole = run_stage(store, "merge", {}, inputs={"models": models[:2]})
    assert all(torch.equal(tensor, weights(merged)[name]) for name, tensor in weights(whole).items())
    # The sharded model is an input like any other.
    again = run_stage(store, "merge", {}, inputs={"models": [merged, merged]})
    assert all(torch.equal(tensor, weights(merged)[name]) for name, tensor in weights(again).items())


def changed(model: Artifact, folder: Path, change: Callable[[dict[str, torch.Tensor], dict], None]) -> Artifact:
    """A model with other tensors or another config."""
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return Artifact.load(folder)


def with_nan(tensors: dict, config: dict) -> None:
    tensors[NAME][0, 0] = float("nan")


def with_infinity(tensors: dict, config: dict) -> None:
    tensors[NAME][-1, -1] = float("-inf")


def without_one(tensors: dict, config: dict) -> None:
    del tensors[NAME]


def with_one_more(tensors: dict, config: dict) -> None:
    tensors[NAME + "_scale"] = torch.ones(1)


def with_other_shape(tensors: dict, config: dict) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def with_integers(tensors: dict, config: dict) -> None:
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)


def with_other_rope(tensors: dict, config: dict) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}


def tied(tensors: dict, config: dict) -> None:
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]


def with_other_norms(tensors: dict, config: dict) -> None:
    config["rms_norm_eps"] = 0.5


def deeper(tensors: dict, config: dict) -> None:
    config["num_hidden_layers"] = 7


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (with_nan, ["has NaN or infinite values", NAME]),
        (with_infinity, ["has NaN or infinite values", NAME]),
        (without_one, ["lacks the tensors", NAME]),
        (with_one_more, ["lacks the tensors", "up_proj.weight_scale"]),
        (with_other_shape, ["the shape of", NAME]),
        (with_integers, ["F8_E4M3", "full-precision"]),
        (with_other_rope, ["rope_theta"]),
        (tied, ["tie_word_embeddings"]),
        (deeper, ["num_hidden_layers: 2 and 7"]),
        (with_other_norms, ["rms_norm_eps: ", " and 0.5"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_merged_is_refused_by_name(
    store: Path, models: list[Artifact], tmp_path: Path, change: Callable, messages: list[str]
) -> None:
    spoiled = changed(models[1], tmp_path / models[1].key, change)
    with pytest.raises(ModelError) as caught:
        run_stage(store, "merge", inputs={"models": [models[0], spoiled]})
    assert all(message in str(caught.value) for message in messages), caught.value


@pytest.mark.parametrize(
    ("stage", "config", "inputs"),
    [
        ("diff", {}, {"models": [0, 1]}),
        ("extract_lora", {"r": 2}, {"model": 1, "base": 0}),
        ("moe", {"router": "uniform", "experts": [{}, {}]}, {"base": 0, "experts.0.model": 0, "experts.1.model": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_stage_takes_weights_in_eight_bits_for_numbers(
    store: Path, models: list[Artifact], tmp_path: Path, stage: str, config: dict, inputs: dict
) -> None:
    pair = [models[0], changed(models[1], tmp_path / models[1].key, with_integers)]
    given = {
        name: [pair[place] for place in places] if isinstance(places, list) else pair[places]
        for name, places in inputs.items()
    }
    with pytest.raises(ModelError, match=f"{NAME} is stored as F8_E4M3; take the full-precision model"):
        run_stage(store, stage, config, inputs=given)


@pytest.mark.parametrize(
    ("four", "five"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ),
        (
            {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0],
                    "original_max_position_embeddings": 4096,
                }
            },
        ),
    ],
)
def test_a_rotary_embedding_is_the_same_in_both_spellings(four: dict, five: dict) -> None:
    assert rope_of(four) == rope_of(five)
    assert rope_of({**four, "rope_theta": 5e5}) != rope_of(five)


@pytest.mark.parametrize("key", ["partial_rotary_factor", "original_max_position_embeddings"])
def test_rotary_settings_that_both_tell_have_to_be_the_same(
    store: Path, models: list[Artifact], tmp_path: Path, key: str
) -> None:
    def told(value: float) -> Callable[[dict, dict], None]:
        return lambda tensors, config: config["rope_parameters"].update({key: value})

    one, two = (
        changed(models[place], tmp_path / models[place].key, told(value)) for place, value in ((0, 0.5), (1, 1))
    )
    with pytest.raises(ModelError, match=f"rotary embedding's {key}: 0.5 and 1"):
        run_stage(store, "merge", inputs={"models": [one, two]})


def test_a_method_that_returns_another_size_is_refused(
    tmp_path: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "merge", lambda self, part: part.tensors[0].flatten()[:-1])
    with pytest.raises(ModelError, match="entries instead of"):
        merged_by(tmp_path, models[:2], None, {"uses": "linear"})


def test_methods_that_look_at_data_merge_whole_models_of_one_tokenizer() -> None:
    method = {"uses": "fisher", "data": "d"}
    context = {"components": default_registry()}
    part = [{"sources": [{"model": "a", "layers": [0, 1]}, {"model": "b", "layers": [0, 1]}]}]
    with pytest.raises(ValueError, match="cannot merge slices"):
        MergeConfig.model_validate({"slices": part, "method": method}, context=context)
    with pytest.raises(ValueError, match="models of one tokenizer"):
        MergeConfig.model_validate({"models": ["a", "b"], "method": method, "tokenizer": "union"}, context=context)


def test_all_problems_are_told_at_once(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def several(tensors: dict, config: dict) -> None:
        without_one(tensors, config)
        with_other_rope(tensors, config)
        deeper(tensors, config)

    spoiled = changed(models[1], tmp_path / models[1].key, several)
    with pytest.raises(ModelError, match="3 problems") as caught:
        run_stage(store, "merge", inputs={"models": [models[0], spoiled]})
    assert all(text in str(caught.value) for text in (NAME, "rope_theta", "num_hidden_layers"))


def test_weights_disk_and_vocabularies_are_told_with_the_problems_of_headers(
    store: Path, models: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = changed(models[1], tmp_path / models[1].key, with_other_rope)
    for name in VOCABULARY_FILES:
        (spoiled.path / name).unlink(missing_ok=True)
    usage = shutil.disk_usage(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a tensor was read"))
    gradient = {"weights": [1.0, [-1.0, 0.5]]}
    for tokenizer, about in (("base", "has no tokenizer"), ("union", "has no tokenizer.json")):
        with pytest.raises(ModelError, match="4 problems") as caught:
            run_stage(store, "merge", {**gradient, "tokenizer": tokenizer}, inputs={"models": [models[0], spoiled]})
        assert all(text in str(caught.value) for text in ("rope_theta", about, "sum to zero", "the disk has"))


def test_dtypes_that_are_no_numbers_of_their_own_are_refused_whatever_their_size(
    store: Path, models: list[Artifact], tmp_path: Path
) -> None:
    def scaled(tensors: dict, config: dict) -> None:
        tensors["model.scales"] = torch.ones(8).to(torch.float8_e8m0fnu)

    odd = changed(models[1], tmp_path / models[1].key, scaled)
    with pytest.raises(ModelError, match=r"model\.scales is stored as F8_E8M0"):
        run_stage(store, "merge", inputs={"models": [models[0], odd]})


def test_a_plan_names_models_without_a_tokenizer() -> None:
    config = MergeConfig.model_validate({"models": ["a", "b", "c"]}, context={"components": default_registry()})
    facts = [{"architecture": "x", "tensors": 3, "tokenizer": digest} for digest in ("one", NO_TOKENIZER, "one")]
    (problem,) = config.problems({"models": facts})
    assert "1 of 3 have no tokenizer" in problem


def test_filters_that_no_parameter_has_are_told(store: Path, models: list[Artifact]) -> None:
    density = [{"filter": "mlpp", "value": 0.2}, {"filter": "self_attn", "value": 0.3}, {"value": 0.5}]
    config = {
        "weights": [[{"filter": "lm_hed", "value": 2.0}, {"value": 1.0}], 1.0],
        "method": {"uses": "ties", "density": density},
    }
    merged = run_stage(store, "merge", config, inputs={"models": models[:2], "base": models[2]})
    (warning,) = merged.manifest["warnings"]
    assert "no parameter's name contains 'lm_hed', 'mlpp'" in warning


def test_values_that_do_not_fit_the_dtype_are_refused(store: Path, models: list[Artifact]) -> None:
    config = {"method": {"uses": "linear", "normalize": False}, "weights": [1e7, 1], "dtype": "float16"}
    with pytest.raises(ModelError, match="do not fit into float16"):
        run_stage(store, "merge", config, inputs={"models": models[:2]})


def test_a_model_that_does_not_load_whole_is_not_stored(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def counted(tensors: dict, config: dict) -> None:
        tensors["model.steps"] = torch.tensor([3, 4])

    two = [changed(model, tmp_path / model.key, counted) for model in models[:2]]
    with pytest.raises(ModelError, match=r"unexpected keys: .'model.steps'"):
        run_stage(store, "merge", inputs={"models": two})


def test_an_adapter_is_merged_on_its_own_model_whatever_else_is(
    store: Path, models: list[Artifact], adapter: Artifact
) -> None:
    merged = run_stage(store, "merge", {"dtype": "float32"}, inputs={"models": [adapter, models[1]]})
    folded, other = fold(load_model(adapter)).state_dict(), weights(models[1])
    torch.testing.assert_close(weights(merged)[NAME], (folded[NAME] + other[NAME].float()) / 2, rtol=1e-4, atol=1e-5)
    assert not merged.manifest["warnings"]


def test_an_adapter_that_does_not_sit_on_the_base_is_told(
    store: Path, models: list[Artifact], adapter: Artifact
) -> None:
    config = {"method": "task_arithmetic", "dtype": "float32"}
    own = run_stage(store, "merge", config, inputs={"models": [adapter], "base": models[0]})
    assert not own.manifest["warnings"]
    other = run_stage(store, "merge", config, inputs={"models": [adapter], "base": models[1]})
    assert "not on the base" in other.manifest["warnings"][0]


def test_nothing_of_an_earlier_merge_is_left_behind(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    stages = {"soup": {"uses": "merge", "models": [str(model.path) for model in models[:2]], "shard_size": 50_000}}
    recipe = Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=tmp_path)
    key = plan(recipe, tmp_path / "s").nodes["soup"].key
    # A merge that was killed left its shards in the scratch folder.
    left = tmp_path / "s" / "work" / key / "out"
    left.mkdir(parents=True)
    for name in ("model.safetensors", "model-00001-of-00009.safetensors", "old.json"):
        shutil.copyfile(models[2].path / "model.safetensors", left / name)
    made = run(recipe, store=tmp_path / "s").artifact("soup")
    names = {path.name for path in made.path.iterdir()}
    assert not names & {"model.safetensors", "model-00001-of-00009.safetensors", "old.json"}
    index = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name in names if name.endswith(".safetensors")} == set(index.values())


def test_a_file_that_the_index_does_not_name_is_an_error(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    merged = run_stage(store, "merge", {"shard_size": 50_000}, inputs={"models": models[:2]})
    shutil.copytree(merged.path, tmp_path / "stray")
    check_index(tmp_path / "stray")
    shutil.copyfile(models[0].path / "model.safetensors", tmp_path / "stray" / "model.safetensors")
    with pytest.raises(ModelError, match="do not fit the index"):
        check_index(tmp_path / "stray")


def test_what_the_disk_cannot_hold_is_refused_before_a_tensor_is_read(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(StoreError, match=r"the merged model takes 0\.00 GB, the disk has 0\.00 GB left"):
        run_stage(store, "merge", inputs={"models": models[:2]})


def looked_at_apart(folder: Path, meanwhile: str) -> subprocess.CompletedProcess[str]:
    """A look at a model by another process, started by one without transformers that does something first."""
    code = (
        "import os, signal, sys; from pathlib import Path; from luthier.merging.verify import Verifier\n"
        f"with Verifier(Path(sys.argv[1])) as verifier:\n    {meanwhile}\n    print(verifier.verdict())\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


def test_the_other_process_tells_what_it_finds(tmp_path: Path, models: list[Artifact]) -> None:
    light = "assert 'transformers' not in sys.modules"
    good = looked_at_apart(models[0].path, light)
    assert "'forward': 'finite'" in good.stdout, good.stderr
    bad = looked_at_apart(changed(models[1], tmp_path / "spoiled", without_one).path, light)
    assert "missing keys" in bad.stderr
    assert NAME in bad.stderr


def test_a_process_that_is_killed_is_told_as_such(models: list[Artifact]) -> None:
    done = looked_at_apart(models[0].path, "os.kill(verifier._process.pid, signal.SIGKILL)")
    assert done.returncode != 0
    assert "signal 9 ended the process that looked at it" in done.stderr


def test_models_of_other_dtypes_are_merged_in_float32(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def to(dtype: torch.dtype) -> Callable:
        def change(tensors: dict, config: dict) -> None:
            tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

        return change

    dtypes = [torch.float16, torch.float64, torch.float32]
    several = [changed(model, tmp_path / model.key, to(dtype)) for model, dtype in zip(models, dtypes, strict=True)]
    merged = run_stage(store, "merge", {"weights": [1, 2, 3]}, inputs={"models": several})
    assert merged.facts["dtype"] == "F16"
    wide = run_stage(store, "merge", {"weights": [1, 2, 3], "dtype": "float32"}, inputs={"models": several})
    parts = [weights(model) for model in several]
    for name, tensor in weights(wide).items():
        expected = sum(share * part[name].double() for share, part in zip((1 / 6, 2 / 6, 3 / 6), parts, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weights(merged)[name], tensor.to(torch.float16))


def test_what_fisher_and_regmean_learn_is_what_the_models_do(store: Path) -> None:
    texts = [{"text": "the letter is in the drawer"}, {"text": "count to seven"}]
    data = tiny_dataset(store, texts)
    pair = [tiny_model(store, seed=seed, dtype="float32", tied=False) for seed in (5, 6)]
    name = "model.layers.1.self_attn.q_proj.weight"
    shares, inputs = [], []
    for artifact in pair:
        model, tokenizer = load_model(artifact), load_tokenizer(artifact)
        squares, seen = 0, []
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, given, seen=seen: seen.append(given[0].detach()[0])
        )
        for row in texts:
            ids = torch.tensor([encode_text(tokenizer, row["text"]).input_ids])
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            squares = squares + torch.autograd.grad(loss, model.get_parameter(name))[0].square()
        shares.append(squares / len(texts))
        inputs.append(torch.cat(seen))
    plain = [weights(artifact)[name] for artifact in pair]

    def merged(method: dict) -> torch.Tensor:
        config = {"method": {"data": "d", **method}}
        return weights(run_stage(store, "merge", config, inputs={"models": pair, "method.data": data}))[name]

    floor = 1e-8
    expected = sum((share + floor) * tensor for share, tensor in zip(shares, plain, strict=True))
    expected = expected / sum(share + floor for share in shares)
    torch.testing.assert_close(merged({"uses": "fisher", "floor": floor}), expected, rtol=1e-3, atol=1e-5)
    found = merged({"uses": "regmean", "alpha": 0.5})
    half = 0.5 + 0.5 * torch.eye(found.shape[1], dtype=torch.float64)
    grams = [(x.double().T @ x.double()) * half for x in inputs]
    right = sum(gram @ tensor.double().T for gram, tensor in zip(grams, plain, strict=True))
    torch.testing.assert_close(sum(grams) @ found.double().T, right, rtol=1e-3, atol=1e-3)


def test_fisher_and_regmean_follow_the_data(store: Path) -> None:
    data = tiny_dataset(store, CHATS)
    base = tiny_model(store, seed=3, dtype="float32")
    tuned = run_stage(store, "sft", {"steps": 12, "learning_rate": 3e-3}, inputs={"model": base, "data": [data]})
    moved = run_stage(store, "merge", {"method": {"uses": "linear"}}, inputs={"models": [base, tuned]})
    rows = read_split(data, "train")

    def loss(artifact: Artifact) -> float:
        stops = artifact.facts["stop_token_ids"]
        needs = [Needs(token_logps=True)]
        logps, _ = measured(load_model(artifact), load_tokenizer(artifact), rows, stops, needs, store)
        return -sum(map(sum, logps)) / sum(map(len, logps))

    for method in ("fisher", "regmean"):
        config = {"method": {"uses": method, "data": "d", "rows": 4}}
        merged = run_stage(store, "merge", config, inputs={"models": [base, tuned], "method.data": data})
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(merged).values())
        equal = run_stage(store, "merge", config, inputs={"models": [tuned, tuned], "method.data": data})
        for name, tensor in weights(equal).items():
            torch.testing.assert_close(tensor, weights(tuned)[name], rtol=1e-3, atol=1e-4)
        # Both weigh models by what they do on the data; the plain mean does not.
        assert loss(merged) != pytest.approx(loss(moved), rel=1e-6)
        assert loss(merged) < loss(base)


SLICES = {"method": "passthrough", "slices": [{"sources": [{"layers": [0, 2]}]}, {"sources": [{"layers": [0, 2]}]}]}


def stacked(models: list[Artifact]) -> dict[str, Artifact]:
    """The inputs of two slices."""
    return {f"slices.{place}.sources.0.model": model for place, model in enumerate(models)}


def with_a_bias(tensors: dict, config: dict) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)


def with_a_table(tensors: dict, config: dict) -> None:
    tensors["model.scale_table"] = torch.ones(3)


def with_more_rows(tensors: dict, config: dict) -> None:
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:8]])
    config["vocab_size"] += 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_bias, "self_attn.q_proj.bias is none in"),
        (with_a_table, "model.scale_table is none in"),
        (with_more_rows, "model.embed_tokens.weight is"),
    ],
)
@pytest.mark.parametrize("second", [True, False])
def test_no_tensor_of_a_slice_is_dropped_and_no_shape_is_guessed(
    store: Path, models: list[Artifact], tmp_path: Path, change: Callable, message: str, second: bool
) -> None:
    odd = changed(models[1], tmp_path / models[1].key, change)
    both = {"method": "linear", "slices": [{"sources": [{"layers": [0, 2]}, {"layers": [0, 2]}]}]}
    pair = [models[0], odd] if second else [odd, models[0]]
    inputs = {f"slices.0.sources.{place}.model": model for place, model in enumerate(pair)}
    with pytest.raises(ModelError) as caught:
        run_stage(store, "merge", both, inputs=inputs)
    assert message.partition(" is")[0] in str(caught.value)


def test_a_slice_beyond_the_last_layer_is_refused(store: Path, models: list[Artifact]) -> None:
    config = {"method": "passthrough", "slices": [{"sources": [{"layers": [1, 3]}]}]}
    with pytest.raises(ModelError, match=r"has 2 layers; a slice takes \[1, 3\]"):
        run_stage(store, "merge", config, inputs={"slices.0.sources.0.model": models[0]})


def test_a_layer_scaled_to_nothing_changes_nothing(store: Path, models: list[Artifact]) -> None:
    nothing = [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]
    slices = [{"sources": [{"layers": [0, 2]}]}, {"sources": [{"layers": [1, 2], "scale": nothing}]}]
    merged = run_stage(store, "merge", {"method": "passthrough", "slices": slices}, inputs=stacked([models[0]] * 2))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        before, after = (load_model(item)(input_ids=ids).logits for item in (models[0], merged))
    assert merged.facts["tensors"] > models[0].facts["tensors"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_random_masks_of_mergekit_are_the_same_for_any_number_of_workers(
    tmp_path: Path, models: list[Artifact]
) -> None:
    values = {"uses": "mergekit", "name": "dare_ties", "parameters": {"density": 0.5}}
    found = [merged_by(tmp_path, models[:2], models[2], values, workers=workers) for workers in (1, 4, 4)]
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_weights_that_sum_to_zero_somewhere_are_named_before_anything_is_read(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=r"sum to zero for \d+ parameters, and linear divides"):
        run_stage(store, "merge", {"weights": [1.0, [-1.0, 0.5]]}, inputs={"models": models[:2]})


def test_alpha_patterns_are_the_regular_expressions_that_peft_takes_them_for(tmp_path: Path, adapter: Artifact) -> None:
    folder = tmp_path / adapter.key
    shutil.copytree(adapter.path, folder)
    shutil.copytree(adapter.base.path, tmp_path / adapter.base.key)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"model\.layers\.0\..*q_proj": 40, "v_proj": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    odd = Artifact.load(folder)
    found = merged_by(tmp_path, [odd], None, {"uses": "passthrough"})
    folded = fold(load_model(odd)).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-4, atol=1e-5)


def test_an_output_head_that_repeats_its_embedding_is_no_other_tensor(
    store: Path, models: list[Artifact], tmp_path: Path
) -> None:
    embedding = "model.embed_tokens.weight"

    def stored_twice(tensors: dict, config: dict) -> None:
        assert config["tie_word_embeddings"]
        tensors["lm_head.weight"] = tensors[embedding].clone()

    def own_head(tensors: dict, config: dict) -> None:
        tensors["lm_head.weight"] = tensors[embedding] * 2

    twice = changed(models[0], tmp_path / "twice" / models[0].key, stored_twice)
    taken = run_stage(store, "base", {"source": str(twice.path)})
    for name in ("tensors", "parameters"):
        assert taken.facts[name] == models[0].facts[name]
    config = MergeConfig.model_validate({"models": ["a", "b"]}, context={"components": default_registry()})
    assert config.problems({"models": [taken.facts, models[1].facts]}) == []
    merged = run_stage(store, "merge", inputs={"models": [taken, models[1]]})
    plain = run_stage(store, "merge", inputs={"models": models[:2]})
    found, expected = weights(merged), weights(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    odd = changed(models[0], tmp_path / "odd" / models[0].key, own_head)
    with pytest.raises(ModelError, match=r"lacks the tensors lm_head\.weight"):
        run_stage(store, "merge", inputs={"models": [odd, models[1]]})


def test_buffers_that_programs_compute_are_no_parameters(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def as_before(tensors: dict, config: dict) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.arange(8, dtype=torch.float32)

    old = changed(models[0], tmp_path / models[0].key, as_before)
    taken = run_stage(store, "base", {"source": str(old.path)})
    assert taken.facts["tensors"] == models[0].facts["tensors"]
    merged = run_stage(store, "merge", {"method": "task_arithmetic"}, inputs={"models": [models[1]], "base": taken})
    assert merged.facts["left_out"] == [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    assert weights(merged).keys() == weights(models[0]).keys()


def test_a_number_is_not_merged_with_a_whole_number(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def whole(tensors: dict, config: dict) -> None:
        tensors[NAME] = tensors[NAME].to(torch.int64)

    odd = changed(models[1], tmp_path / models[1].key, whole)
    with pytest.raises(ModelError, match=f"{NAME} is stored as BF16 in .* as I64"):
        run_stage(store, "merge", inputs={"models": [models[0], odd]})


def test_where_all_weights_are_zero_a_method_with_a_base_changes_nothing(store: Path, models: list[Artifact]) -> None:
    inputs = {"models": models[:2], "base": models[2]}
    for name in ("task_arithmetic", "dare_linear", "ties", "iso_c"):
        method = {"uses": name, **({} if name == "iso_c" else {"normalize": True})}
        config = {"method": method, "weights": [[0.0, 1.0], [0.0, 1.0]], "dtype": "float32"}
        merged = weights(run_stage(store, "merge", config, inputs=inputs))
        first, last = NAME, NAME.replace("layers.0", "layers.1")
        torch.testing.assert_close(merged[first], weights(models[2])[first].float())
        assert not torch.equal(merged[last], weights(models[2])[last].float())


def test_tokenizers_are_told_apart_by_their_tokens_and_not_by_their_bytes(
    store: Path, models: list[Artifact], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(models[1].path, again, ignore=shutil.ignore_patterns("manifest.json"))
    tokenizer = AutoTokenizer.from_pretrained(again)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(again)
    content = json.loads((again / "tokenizer.json").read_text())
    assert content["padding"]
    assert content["truncation"]
    content["model"]["merges"] = [
        " ".join(merge) if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]
    ]
    (again / "tokenizer.json").write_text(json.dumps(content))
    taken = run_stage(store, "base", {"source": str(again)})
    assert taken.facts["tokenizer"] == models[1].facts["tokenizer"]
    run_stage(store, "merge", inputs={"models": [models[0], taken]})
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (again / "tokenizer.json").write_text(json.dumps(content))
    other = run_stage(store, "base", {"source": str(again)})
    assert other.facts["tokenizer"] != taken.facts["tokenizer"]
    with pytest.raises(ModelError, match="different tokenizers"):
        run_stage(store, "merge", inputs={"models": [models[0], other]})


def test_masks_are_those_of_the_model_and_of_the_parameter(models: list[Artifact], tmp_path: Path) -> None:
    dare = {"uses": "dare_linear", "density": 0.5}
    base = models[2]

    def kept(model: Artifact, name: str) -> torch.Tensor:
        return merged_by(tmp_path, [model], base, dare)[name] != weights(base)[name].float()

    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qo")
    masks = [kept(models[0], query), kept(models[0], key), kept(models[1], query)]
    assert torch.equal(masks[0], kept(models[0], query))
    for left, right in combinations(masks, 2):
        assert 0.4 < float((left == right).float().mean()) < 0.6, "independent of each other"


def test_the_result_is_stored_as_the_base_is(store: Path, models: list[Artifact]) -> None:
    wide = tiny_model(store, seed=7, dtype="float32")
    merged = run_stage(store, "merge", {"method": "task_arithmetic"}, inputs={"models": [wide], "base": models[0]})
    assert merged.facts["dtype"] == "BF16"
    other = run_stage(store, "merge", {"method": "task_arithmetic"}, inputs={"models": [models[0]], "base": wide})
    assert other.facts["dtype"] == "F32"


def test_whole_numbers_are_copied_from_the_base_and_listed(
    store: Path, models: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(steps: int) -> Callable:
        def change(tensors: dict, config: dict) -> None:
            tensors["model.steps"] = torch.tensor([steps, 2**40 + 1])

        return change

    pair = [changed(model, tmp_path / model.key, counted(place)) for place, model in enumerate(models[:2])]
    # transformers has no place for such a tensor: that it is written is looked at here.
    monkeypatch.setattr("luthier.merging.verify.load_check", lambda folder: {})
    merged = run_stage(store, "merge", {"method": "task_arithmetic"}, inputs={"models": pair[:1], "base": pair[1]})
    assert merged.facts["copied"] == ["model.steps"]
    assert weights(merged)["model.steps"].tolist() == [1, 2**40 + 1]


def test_whole_matrices_wait_for_each_other_where_memory_is_short(models: list[Artifact], tmp_path: Path) -> None:
    inputs = Inputs([Weights(model) for model in models[:2]], None)
    config = MergeConfig.model_validate({"models": ["a", "b"]}, context={"components": default_registry()})
    layout = lay_out(config, inputs, 0, "float32")
    lock, now, most = threading.Lock(), [0], [0]

    class Slow:
        granularity = "matrix"

        def merge(self, part: MergePart) -> torch.Tensor:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1
            return part.tensors[0]

    for memory, expected in ((1, 1), (1 << 30, 4)):
        most[0] = 0
        output = Output(Path(tempfile.mkdtemp(dir=tmp_path)), layout.tensors, 1 << 30)
        Engine(Slow(), output, Settings(4, memory=memory), lambda done, total: None).run(layout.jobs)
        output.close()
        assert most[0] == expected


def test_a_merge_on_a_raw_base_talks_as_its_models_do(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(models[2].path, raw, ignore=shutil.ignore_patterns("manifest.json", "chat_template.jinja"))
    (raw / "generation_config.json").write_text('{"eos_token_id": 0}')
    base = run_stage(store, "base", {"source": str(raw)})
    assert base.facts["chat_template"] is None
    config = {"method": "task_arithmetic"}
    merged = run_stage(store, "merge", config, inputs={"models": models[:2], "base": base})
    for name in ("chat_template", "stop_token_ids"):
        assert merged.facts[name] == models[0].facts[name] != base.facts[name]
    assert not merged.manifest["warnings"]
    own = tmp_path / "own"
    shutil.copytree(models[1].path, own, ignore=shutil.ignore_patterns("manifest.json"))
    (own / "chat_template.jinja").write_text("{{ 3 }}")
    other = run_stage(store, "base", {"source": str(own)})
    told = run_stage(store, "merge", config, inputs={"models": [models[0], other], "base": base})
    assert told.facts["chat_template"] == models[0].facts["chat_template"]
    assert "have another" in told.manifest["warnings"][0]


@pytest.mark.parametrize("name", ["model_type", "architecture"])
def test_models_of_another_architecture_are_refused(
    store: Path, models: list[Artifact], tmp_path: Path, name: str
) -> None:
    if name == "architecture":
        config = MergeConfig.model_validate({"models": ["a", "b"]}, context={"components": default_registry()})
        facts = [model.facts for model in models[:2]]
        assert config.problems({"models": facts}) == []
        (told,) = config.problems({"models": [facts[0], {**facts[1], "architecture": "MistralForCausalLM"}]})
        assert "architecture differs: LlamaForCausalLM and MistralForCausalLM" in told
        return

    def mistral(tensors: dict, config: dict) -> None:
        config["model_type"] = "mistral"

    odd = changed(models[1], tmp_path / models[1].key, mistral)
    with pytest.raises(ModelError, match="differ in model_type: llama and mistral"):
        run_stage(store, "merge", inputs={"models": [models[0], odd]})


def test_what_is_written_is_looked_at(
    store: Path, models: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models[0].path, folder)
    assert Verifier(folder).verdict() == {"loaded": "memory", "forward": "finite"}
    with monkeypatch.context() as patch:
        patch.setattr(load_check, "ROOM", 0.0)
        assert Verifier(folder).verdict() == {"loaded": "meta device"}
        lacking = changed(models[1], tmp_path / "lacking", without_one)
        with pytest.raises(ModelError, match="missing keys"):
            Verifier(lacking.path).verdict()
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="do not fit the index"):
        Verifier(folder).verdict()

    def endless(tensors: dict, config: dict) -> None:
        tensors["model.norm.weight"][:] = 3e38

    with pytest.raises(ModelError, match="a forward pass gives NaN or infinite values"):
        Verifier(changed(models[1], tmp_path / "endless", endless).path).verdict()


def test_a_base_and_its_chat_model_may_differ_in_what_tells_nothing(
    store: Path, models: list[Artifact], tmp_path: Path
) -> None:
    def written(**values: object) -> Callable:
        return lambda tensors, config: config.update(values)

    idle = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "rms_norm_eps": 1e-5}
    changes = [idle, {**idle, "sliding_window": 128, "max_window_layers": 21, "rms_norm_eps": 1e-6}]
    pair = [
        changed(model, tmp_path / model.key, written(**values)) for model, values in zip(models, changes, strict=False)
    ]
    check_same(Inputs([Weights(model) for model in pair], None))
    sliding = changed(models[1], tmp_path / "on" / models[1].key, written(**{**changes[1], "use_sliding_window": True}))
    with pytest.raises(ModelError, match="differ in sliding_window: 4096 and 128"):
        check_same(Inputs([Weights(pair[0]), Weights(sliding)], None))
