"""What a merge writes, and that it is checked before it is stored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Recipe, plan, run
from luthier.api import Artifact, ModelError
from luthier.merging import load_check
from luthier.merging.config import MergeConfig
from luthier.merging.files import DTYPES, Scratch
from luthier.merging.verify import Verifier, check_index
from luthier.merging.writer import Described, Output
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_model
from merged_models import NAME, changed, weights, without_one
from safetensors.torch import load_file

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


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


def test_shards_have_an_index_and_load(store: Path, models: list[Artifact]) -> None:
    merged = run_stage(store, "merge", {"shard_size": 50_000}, inputs={"models": models[:2]})
    assert len(list(merged.path.glob("model-*-of-*.safetensors"))) > 2
    whole = run_stage(store, "merge", {}, inputs={"models": models[:2]})
    assert all(torch.equal(tensor, weights(merged)[name]) for name, tensor in weights(whole).items())
    # The sharded model is an input like any other.
    again = run_stage(store, "merge", {}, inputs={"models": [merged, merged]})
    assert all(torch.equal(tensor, weights(merged)[name]) for name, tensor in weights(again).items())


def test_a_model_that_does_not_load_whole_is_not_stored(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def counted(tensors: dict, config: dict) -> None:
        tensors["model.steps"] = torch.tensor([3, 4])

    two = [changed(model, tmp_path / model.key, counted) for model in models[:2]]
    with pytest.raises(ModelError, match=r"unexpected keys: .'model.steps'"):
        run_stage(store, "merge", inputs={"models": two})


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
    shutil.copyfile(models[0].path / "model.safetensors", tmp_path / "stray" / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors do not belong to it"):
        check_index(tmp_path / "stray")


def checked_by_a_process(folder: Path, meanwhile: str) -> subprocess.CompletedProcess[str]:
    """A check of a model by another process, started by one without transformers that does something first."""
    code = (
        "import os, signal, sys; from pathlib import Path; from luthier.merging.verify import Verifier\n"
        f"with Verifier(Path(sys.argv[1])) as verifier:\n    {meanwhile}\n    print(verifier.verdict())\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


def test_the_other_process_reports_what_it_finds(tmp_path: Path, models: list[Artifact]) -> None:
    light = "assert 'transformers' not in sys.modules"
    good = checked_by_a_process(models[0].path, light)
    assert "'forward': 'finite'" in good.stdout, good.stderr
    bad = checked_by_a_process(changed(models[1], tmp_path / "spoiled", without_one).path, light)
    assert "missing keys" in bad.stderr
    assert NAME in bad.stderr


def test_a_process_that_is_killed_is_reported_as_such(models: list[Artifact]) -> None:
    done = checked_by_a_process(models[0].path, "os.kill(verifier._process.pid, signal.SIGKILL)")
    assert done.returncode != 0
    assert "signal 9 ended the process that checked it" in done.stderr


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
    assert config.input_problems({"models": [taken.facts, models[1].facts]}) == []
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
    # transformers has no place for such a tensor: that it is written is checked here.
    monkeypatch.setattr("luthier.merging.verify.load_check", lambda folder: {})
    merged = run_stage(store, "merge", {"method": "task_arithmetic"}, inputs={"models": pair[:1], "base": pair[1]})
    assert merged.facts["copied"] == ["model.steps"]
    assert weights(merged)["model.steps"].tolist() == [1, 2**40 + 1]


def test_what_is_written_is_checked(
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
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors do not belong to it"):
        Verifier(folder).verdict()

    def endless(tensors: dict, config: dict) -> None:
        tensors["model.norm.weight"][:] = 3e38

    with pytest.raises(ModelError, match="a forward pass gives NaN or infinite values"):
        Verifier(changed(models[1], tmp_path / "endless", endless).path).verdict()
