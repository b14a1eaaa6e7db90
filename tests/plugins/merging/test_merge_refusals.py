"""What a merge refuses, by name and before it reads a tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from luthier.api import Artifact, ModelError, StoreError
from luthier.artifacts.texts import NO_TOKENIZER, VOCABULARY_FILES
from luthier.merging.check import check_same, rope_of
from luthier.merging.config import MergeConfig
from luthier.merging.layout import Inputs
from luthier.merging.reader import Weights
from luthier.registry import default_registry
from luthier.testing import resealed, run_stage
from luthier_plugins.merge_methods.linear import Linear
from merged_models import (
    NAME,
    changed,
    deeper,
    merged_by,
    tied,
    with_a_bias,
    with_a_table,
    with_infinity,
    with_integers,
    with_more_rows,
    with_nan,
    with_one_more,
    with_other_norms,
    with_other_rope,
    with_other_shape,
    without_one,
)
from transformers import AutoTokenizer


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
def test_rotary_settings_that_both_state_have_to_be_the_same(
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
    with pytest.raises(ValueError, match="models with the same tokenizer"):
        MergeConfig.model_validate({"models": ["a", "b"], "method": method, "tokenizer": "union"}, context=context)


def test_all_problems_are_reported_at_once(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def several(tensors: dict, config: dict) -> None:
        without_one(tensors, config)
        with_other_rope(tensors, config)
        deeper(tensors, config)

    spoiled = changed(models[1], tmp_path / models[1].key, several)
    with pytest.raises(ModelError, match="3 problems") as caught:
        run_stage(store, "merge", inputs={"models": [models[0], spoiled]})
    assert all(text in str(caught.value) for text in (NAME, "rope_theta", "num_hidden_layers"))


def test_weights_disk_and_vocabularies_are_reported_with_the_problems_of_headers(
    store: Path, models: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = changed(models[1], tmp_path / models[1].key, with_other_rope)
    for name in VOCABULARY_FILES:
        (spoiled.path / name).unlink(missing_ok=True)
    spoiled = resealed(spoiled.path)
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
    (problem,) = config.input_problems({"models": facts})
    assert "1 of 3 have no tokenizer" in problem


def test_filters_that_no_parameter_has_are_reported(store: Path, models: list[Artifact]) -> None:
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


def test_what_the_disk_cannot_hold_is_refused_before_a_tensor_is_read(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(StoreError, match=r"the merged model takes 0\.00 GB, the disk has 0\.00 GB left"):
        run_stage(store, "merge", inputs={"models": models[:2]})


SLICES = {"method": "passthrough", "slices": [{"sources": [{"layers": [0, 2]}]}, {"sources": [{"layers": [0, 2]}]}]}


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


def test_weights_that_sum_to_zero_somewhere_are_named_before_anything_is_read(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=r"sum to zero for \d+ parameters, and linear divides"):
        run_stage(store, "merge", {"weights": [1.0, [-1.0, 0.5]]}, inputs={"models": models[:2]})


def test_a_number_is_not_merged_with_a_whole_number(store: Path, models: list[Artifact], tmp_path: Path) -> None:
    def whole(tensors: dict, config: dict) -> None:
        tensors[NAME] = tensors[NAME].to(torch.int64)

    odd = changed(models[1], tmp_path / models[1].key, whole)
    with pytest.raises(ModelError, match=f"{NAME} is stored as BF16 in .* as I64"):
        run_stage(store, "merge", inputs={"models": [models[0], odd]})


@pytest.mark.parametrize("name", ["model_type", "architecture"])
def test_models_of_another_architecture_are_refused(
    store: Path, models: list[Artifact], tmp_path: Path, name: str
) -> None:
    if name == "architecture":
        config = MergeConfig.model_validate({"models": ["a", "b"]}, context={"components": default_registry()})
        facts = [model.facts for model in models[:2]]
        assert config.input_problems({"models": facts}) == []
        (told,) = config.input_problems({"models": [facts[0], {**facts[1], "architecture": "MistralForCausalLM"}]})
        assert "architecture differs: LlamaForCausalLM and MistralForCausalLM" in told
        return

    def mistral(tensors: dict, config: dict) -> None:
        config["model_type"] = "mistral"

    odd = changed(models[1], tmp_path / models[1].key, mistral)
    with pytest.raises(ModelError, match="differ in model_type: llama and mistral"):
        run_stage(store, "merge", inputs={"models": [models[0], odd]})


def test_tokenizers_are_compared_by_their_tokens_and_not_by_their_bytes(
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


def test_a_base_and_its_chat_model_may_differ_in_what_means_nothing(
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
