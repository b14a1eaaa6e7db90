"""A quantized model is a model: measured, talked to, exported as it is; trained and merged it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.api import Artifact, ModelError, RecipeError, Sampling
from luthier.modeling.generate import TransformersGenerator
from luthier.modeling.loading import load_model
from luthier.testing import run_stage, tiny_dataset, tiny_model

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(6)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tuned(store: Path) -> Artifact:
    inputs = {"model": tiny_model(store), "data": [tiny_dataset(store, ROWS)]}
    return run_stage(store, "sft", {"steps": 10, "learning_rate": 3e-3, "adapter": "lora"}, inputs=inputs)


@pytest.fixture(scope="module", params=["int8", "gptq"])
def small(store: Path, tuned: Artifact, request: pytest.FixtureRequest) -> Artifact:
    method = {"uses": request.param, "largest_kl": 5.0}
    if request.param == "gptq":
        method["group_size"] = 32
    return run_stage(store, "quantize", {"method": method}, inputs={"model": tuned})


def test_its_facts_say_how_it_is_quantized(small: Artifact, tuned: Artifact) -> None:
    assert small.kind == "model"
    about = small.facts["quantization"]
    assert about["method"] in ("int8", "gptq")
    assert about["layers"] == 14
    assert about["kl"] > 0
    assert small.facts["parameters"] == tuned.base.facts["parameters"]
    assert small.facts["stop_token_ids"] == tuned.facts["stop_token_ids"]


def test_it_is_measured_beside_the_model_it_was(store: Path, small: Artifact, tuned: Artifact) -> None:
    data = tiny_dataset(store, ROWS, split="test")
    config = {"metrics": ["perplexity", "exact_match"], "max_new_tokens": 8}
    report = run_stage(store, "evaluate", config, inputs={"model": small, "against": [tuned], "data": data})
    mine, theirs = (report.facts["scores"], report.facts["against"][0]["scores"])
    assert mine["perplexity"] != theirs["perplexity"]
    assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.2)


def test_it_can_be_chatted_with(small: Artifact, tmp_path: Path) -> None:
    with TransformersGenerator(small, tmp_path / "floats") as generator:
        ((answer,),) = generator.generate([ROWS[0]["messages"][:1]], Sampling(max_new_tokens=6))
    assert answer.tokens in range(1, 7)


def test_an_export_writes_it_as_it_is_and_equals_the_short_form(store: Path, small: Artifact, tuned: Artifact) -> None:
    two = run_stage(store, "export", {"format": {"uses": "hf", "serve": ["vllm"]}}, inputs={"model": small})
    method = {key: small.facts["quantization"][key] for key in ("group_size",) if key in small.facts["quantization"]}
    quantize = {"uses": small.facts["quantization"]["method"], "largest_kl": 5.0, **method}
    one = run_stage(store, "export", {"format": {"uses": "hf", "quantize": quantize}}, inputs={"model": tuned})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (two.path / name).read_bytes() == (one.path / name).read_bytes()
    assert list(two.facts["files"]) == list(one.facts["files"]) == [quantize["uses"]]
    assert two.facts["kl"] == pytest.approx(one.facts["kl"])
    assert json.loads((two.path / "serve" / "golden.json").read_text())["entries"]
    with pytest.raises(ModelError, match="quantized already"):
        run_stage(store, "export", {"format": {"uses": "hf", "dtype": "float16"}}, inputs={"model": small})
    with pytest.raises(ModelError, match="cannot be written as GGUF"):
        run_stage(store, "export", inputs={"model": small})
    with pytest.raises(ModelError, match="cannot be quantized again"):
        run_stage(store, "quantize", {"method": "int8"}, inputs={"model": small})


RECIPE = {
    "luthier": 1,
    "stages": {
        "chats": {"uses": "data", "source": "chats.jsonl"},
        "base": {"uses": "base"},
        "small": {"uses": "quantize", "model": "base", "method": "int8"},
        "trained": {"uses": "sft", "model": "small", "data": "chats"},
        "merged": {"uses": "merge", "models": ["base", "small"]},
        "compared": {"uses": "diff", "models": ["base", "small"]},
        "extracted": {"uses": "extract_lora", "model": "small", "base": "base", "r": 2},
        "again": {"uses": "quantize", "model": "small", "method": "int8"},
    },
}


REMEDIES = {
    "trained": "train the full-precision model, and quantize what comes out",
    "merged": "merge the full-precision models, and quantize what is made of them",
    "again": "take the model that it was made from",
    "compared": "take the models before they were quantized",
    "extracted": "take the models before they were quantized",
}


def test_computing_with_its_weights_is_refused_before_anything_runs(tmp_path: Path, chats: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(Recipe.from_mapping(RECIPE, folder=tmp_path), tmp_path / "s")
    found = str(caught.value)
    for name, remedy in REMEDIES.items():
        assert remedy in found, name
    assert found.count("the model is quantized (int8)") == len(REMEDIES)


def test_and_once_it_is_made(tmp_path: Path, chats: Path) -> None:
    stages = {name: RECIPE["stages"][name] for name in ("chats", "base", "small")}
    run(Recipe.from_mapping({**RECIPE, "stages": stages}, folder=tmp_path), store=tmp_path / "s")
    with pytest.raises(RecipeError) as caught:
        plan(Recipe.from_mapping(RECIPE, folder=tmp_path), tmp_path / "s")
    assert all(remedy in str(caught.value) for remedy in REMEDIES.values())


def test_an_adapter_remembers_how_its_base_was_loaded(store: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    inputs = {"model": tiny_model(store), "data": [tiny_dataset(store, ROWS)]}
    first = run_stage(store, "sft", {"steps": 2, "adapter": {"uses": "qlora", "r": 4}}, inputs=inputs)
    assert first.facts["load_options"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    further = run_stage(store, "sft", {"steps": 2}, inputs={**inputs, "model": first})
    assert further.kind == "adapter"
    assert further.facts["load_options"] == first.facts["load_options"]
    loaded = load_model(first, trainable=True)
    assert any(isinstance(module, Linear4bit) for module in loaded.modules())
    assert not any(isinstance(module, Linear4bit) for module in load_model(first).modules()), "folded in full precision"
    plain = run_stage(store, "sft", {"steps": 1, "adapter": "lora"}, inputs=inputs)
    assert "load_options" not in plain.facts


def test_a_frozen_base_is_loaded_in_the_dtype_that_was_asked_for(store: Path) -> None:
    inputs = {"model": tiny_model(store), "data": [tiny_dataset(store, ROWS)]}
    config = {"steps": 2, "learning_rate": 1e-3, "adapter": "lora", "dtype": "bf16"}
    made = run_stage(store, "sft", config, inputs=inputs)
    assert made.facts["load_options"] == {"dtype": "bfloat16"}
    loaded = load_model(made, trainable=True)
    dtypes = {str(parameter.dtype) for parameter in loaded.parameters() if parameter.requires_grad}
    frozen = {str(parameter.dtype) for parameter in loaded.parameters() if not parameter.requires_grad}
    assert (dtypes, frozen) == ({"torch.float32"}, {"torch.bfloat16"})
