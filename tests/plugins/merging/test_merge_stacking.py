"""Stacks of layers: every layer keeps the kind it had, wherever it is put."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import make_gpt2, make_model
from luthier.api import Artifact, ModelError
from luthier.merging.config import MergeConfig
from luthier.merging.parts import merge_tensors
from luthier.modeling.loading import load_model
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

FULL, SLIDING = "full_attention", "sliding_attention"
IDS = torch.arange(40, 100)[None]


def taken(folder: Path, name: str, lost: tuple[str, ...] = (), **more: Any) -> Artifact:
    """A model in the store; `lost` are keys that its config does not have, as transformers 4 wrote it."""
    place = make_model(folder / f"{name}-{len(list(folder.iterdir()))}", name, **more)
    config = json.loads((place / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in lost}
    (place / "config.json").write_text(json.dumps(config))
    return run_stage(folder / "s", "base", {"source": str(place)})


def stacked(folder: Path, parts: list[tuple[Artifact, list[int]]]) -> Artifact:
    """A stack of slices of one source each."""
    slices = [{"sources": [{"layers": layers}]} for _, layers in parts]
    inputs = {f"slices.{place}.sources.0.model": model for place, (model, _) in enumerate(parts)}
    return run_stage(folder / "s", "merge", {"method": "passthrough", "slices": slices}, inputs=inputs)


def by_hand(parts: list[tuple[Artifact, list[int]]], **settings: Any) -> torch.Tensor:
    """The logits of the same stack, put together from loaded models."""
    models = [(load_model(model), layers) for model, layers in parts]
    whole, last = models[0][0], models[-1][0]
    layers = [layer for model, (first, behind) in models for layer in model.model.layers[first:behind]]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    whole.model.layers = torch.nn.ModuleList(layers)
    whole.model.norm = last.model.norm
    # It is made for the kinds of layers that there are.
    whole.model.rotary_emb = last.model.rotary_emb
    for key, value in {"num_hidden_layers": len(layers), **settings}.items():
        setattr(whole.config, key, value)
        setattr(whole.model.config, key, value)
    with torch.no_grad():
        return whole(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("lost", [(), ("layer_types",)], ids=["named", "by rule"])
def test_windows_stay_with_their_layers(tmp_path: Path, lost: tuple[str, ...]) -> None:
    model = taken(tmp_path, "gemma2", lost)
    parts = [(model, [0, 2]), (model, [1, 3])]
    merged = stacked(tmp_path, parts)
    kinds = [SLIDING, FULL, FULL, SLIDING]
    assert json.loads((merged.path / "config.json").read_text())["layer_types"] == kinds
    expected = by_hand(parts, layer_types=kinds)
    with torch.no_grad():
        found = load_model(merged)(input_ids=IDS, use_cache=False).logits
        alternating = load_model(merged)
        alternating.model.config.layer_types = [SLIDING, FULL, SLIDING, FULL]
        other = alternating(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-3), "the windows matter here"


def test_layers_of_one_kind_stay_of_that_kind(tmp_path: Path) -> None:
    model = taken(tmp_path, "gemma2", ("layer_types",))
    parts = [(model, [0, 1]), (model, [2, 3]), (model, [0, 1])]
    merged = stacked(tmp_path, parts)
    assert json.loads((merged.path / "config.json").read_text())["layer_types"] == [SLIDING] * 3
    with torch.no_grad():
        found = load_model(merged)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, by_hand(parts, layer_types=[SLIDING] * 3), rtol=1e-4, atol=1e-4)


def test_layers_of_a_deeper_model_keep_their_kind(tmp_path: Path) -> None:
    shallow = taken(tmp_path, "gemma3", num_hidden_layers=3)
    deep = taken(tmp_path, "gemma3", ("layer_types",), num_hidden_layers=8)
    parts = [(shallow, [0, 2]), (deep, [4, 8])]
    merged = stacked(tmp_path, parts)
    kinds = [SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING]
    assert json.loads((merged.path / "config.json").read_text())["layer_types"] == kinds
    with torch.no_grad():
        found = load_model(merged)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, by_hand(parts, layer_types=kinds), rtol=1e-4, atol=1e-4)


def test_layers_of_other_kinds_are_not_merged(tmp_path: Path) -> None:
    model = taken(tmp_path, "gemma2")
    config = {"method": "linear", "slices": [{"sources": [{"layers": [0, 1]}, {"layers": [1, 2]}]}]}
    inputs = {f"slices.0.sources.{place}.model": model for place in range(2)}
    with pytest.raises(ModelError, match=r"layer_types is sliding_attention in layer 0 .* full_attention in layer 1"):
        run_stage(tmp_path / "s", "merge", config, inputs=inputs)


def test_layers_without_experts_stay_without(tmp_path: Path) -> None:
    mixed = taken(tmp_path, "qwen3-moe", num_hidden_layers=4, decoder_sparse_step=2)
    merged = stacked(tmp_path, [(mixed, [1, 3]), (mixed, [0, 2])])
    config = json.loads((merged.path / "config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1, 2], 1)
    first = taken(tmp_path, "deepseek-v2", num_hidden_layers=4)
    none = stacked(tmp_path, [(first, [1, 3])])
    assert json.loads((none.path / "config.json").read_text())["first_k_dense_replace"] == 0
    merged = stacked(tmp_path, [(first, [0, 1]), (first, [0, 3])])
    assert json.loads((merged.path / "config.json").read_text())["first_k_dense_replace"] == 2
    with pytest.raises(ModelError, match="the dense layers of this architecture come first"):
        stacked(tmp_path, [(first, [0, 3]), (first, [0, 1])])


def test_a_plain_model_gets_no_lists(tmp_path: Path) -> None:
    plain = taken(tmp_path, "llama")
    before = json.loads((plain.path / "config.json").read_text())
    merged = stacked(tmp_path, [(plain, [0, 2]), (plain, [0, 3])])
    assert json.loads((merged.path / "config.json").read_text()) == {**before, "num_hidden_layers": 5}


def test_whole_models_with_other_kinds_of_layers_are_refused(tmp_path: Path) -> None:
    pair = [taken(tmp_path, "gemma2"), taken(tmp_path, "gemma2", layer_types=[FULL, SLIDING, FULL])]
    with pytest.raises(ModelError, match="differ in layer_types"):
        run_stage(tmp_path / "s", "merge", inputs={"models": pair})


def test_a_slice_has_settings_and_layers_of_the_base_of_its_own(tmp_path: Path) -> None:
    base, one, two = (tiny_model(tmp_path, seed=seed, layers=4, tied=False, dtype="float32") for seed in range(3))
    slices = [
        {"sources": [{"layers": [0, 2]}, {"layers": [0, 2]}], "settings": {"density": [0.2, 0.6]}},
        {
            "sources": [{"layers": [2, 3]}, {"layers": [3, 4]}],
            "base_layers": [1, 2],
            "settings": {"density": {"per_model": [0.9, 0.1]}, "scale": 0.5},
        },
    ]
    config = {"method": {"uses": "ties", "density": 0.4}, "slices": slices}
    inputs = {
        f"slices.{place}.sources.{number}.model": model for place in range(2) for number, model in enumerate((one, two))
    }
    merged = load_file(run_stage(tmp_path, "merge", config, inputs={**inputs, "base": base}).path / "model.safetensors")
    stored = [load_file(model.path / "model.safetensors") for model in (base, one, two)]
    registry = default_registry()
    component = registry.get("merge_method", "ties")

    def expected(numbers: tuple[int, int, int], tail: str, values: dict) -> torch.Tensor:
        method = registry.impl_class(component)(registry.config_class(component).model_validate(values), None)
        names = [f"model.layers.{number}.{tail}" for number in numbers]
        ancestor, *models = (tensors[name] for tensors, name in zip(stored, names, strict=True))
        return merge_tensors(method, models, [1.0, 1.0], ancestor)

    for tail in ("mlp.up_proj.weight", "input_layernorm.weight"):
        places = [
            ((0, 0, 0), {"density": 0.2}),
            ((1, 1, 1), {"density": 0.6}),
            ((1, 2, 3), {"density": {"per_model": [0.9, 0.1]}, "scale": 0.5}),
        ]
        for layer, (numbers, values) in enumerate(places):
            torch.testing.assert_close(merged[f"model.layers.{layer}.{tail}"], expected(numbers, tail, values))


def test_a_slice_has_a_base_of_its_own(tmp_path: Path) -> None:
    base, one, two = (tiny_model(tmp_path, seed=seed, layers=2, tied=False, dtype="float32") for seed in range(3))
    slices = [{"sources": [{"layers": [0, 1], "weight": 0.5}]}, {"sources": [{"layers": [1, 2], "weight": 0.5}]}]
    config = {"method": "task_arithmetic", "slices": slices}
    inputs = {"slices.0.sources.0.model": one, "slices.1.sources.0.model": one, "slices.1.base": two}
    for shared in ({"base": base}, {"slices.0.base": base}):
        merged = load_file(run_stage(tmp_path, "merge", config, inputs={**inputs, **shared}).path / "model.safetensors")
        first, second, third = (load_file(model.path / "model.safetensors") for model in (base, one, two))
        for name, ancestor in (
            ("model.layers.0.mlp.up_proj.weight", first),
            ("model.embed_tokens.weight", first),
            ("model.layers.1.mlp.up_proj.weight", third),
            ("lm_head.weight", third),
        ):
            torch.testing.assert_close(merged[name], (ancestor[name] + second[name]) / 2)


def test_a_slice_whose_own_base_has_too_few_layers_is_refused(tmp_path: Path) -> None:
    base, one = (tiny_model(tmp_path, seed=seed, layers=2, dtype="float32") for seed in range(2))
    short = tiny_model(tmp_path, seed=2, layers=1, dtype="float32")
    config = {"method": "task_arithmetic", "slices": [{"sources": [{"layers": [1, 2]}]}]}
    with pytest.raises(ModelError, match=r"has 1 layers; a slice takes \[1, 2\]"):
        run_stage(
            tmp_path, "merge", config, inputs={"slices.0.sources.0.model": one, "base": base, "slices.0.base": short}
        )


def test_slices_have_a_base_where_the_method_needs_one() -> None:
    context = {"components": default_registry()}
    bare = {"sources": [{"model": "a", "layers": [0, 1]}] * 2}
    own = {**bare, "base": "b"}
    for method, slices, message in [
        ("ties", [own, bare], "name the models' ancestor as `base`"),
        ("linear", [own, own], "linear does not use a base"),
    ]:
        with pytest.raises(ValueError, match=message):
            MergeConfig.model_validate({"method": method, "slices": slices}, context=context)
    with pytest.raises(ValueError, match="in slices with the one `base`"):
        MergeConfig.model_validate({"method": "ties", "slices": [own], "tokenizer": "union"}, context=context)
    for method, slices in (("ties", [own, {**own, "base_layers": [2, 3]}]), ("nuslerp", [own, bare])):
        assert MergeConfig.model_validate({"method": method, "slices": slices}, context=context).base is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"settings": {"densty": 0.5}}, "`settings` of slice 0: densty"),
        ({"settings": {"density": 2}}, "`settings` of slice 0: density"),
        ({"settings": {"density": {"per_model": [0.5, 0.5]}}}, "not for 1 models"),
        ({"base_layers": [0, 2]}, "its base,"),
        ({"base_layers": [0, 1]}, None),
    ],
)
def test_settings_of_slices_that_say_nothing_are_refused(part: dict, message: str | None) -> None:
    values = {"method": "ties", "base": "b", "slices": [{"sources": [{"model": "a", "layers": [0, 1]}], **part}]}
    context = {"components": default_registry()}
    if message is None:
        assert MergeConfig.model_validate(values, context=context).slices[0].of_base == (0, 1)
        values = {**values, "method": "linear", "base": None}
        message = "are layers of the `base`"
    with pytest.raises(ValueError, match=message):
        MergeConfig.model_validate(values, context=context)


def test_the_command_line_knows_the_models_of_slices_and_tokens_and_the_data_of_methods(
    tmp_path: Path, cli: Any
) -> None:
    one, two = (tiny_model(tmp_path / "s", seed=seed, layers=2, dtype="float32") for seed in range(2))
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    data = tiny_dataset(tmp_path / "s", chats)
    first, second, rows = (artifact.key[:12] for artifact in (one, two, data))
    sources = [
        f"{{sources: [{{model: {first}, layers: [0, 1]}}]}}",
        f"{{sources: [{{model: {second}, layers: [1, 2]}}]}}",
    ]
    commands = {
        "stack": ["method=passthrough", f"slices=[{', '.join(sources)}]"],
        "tokens": [f"models={first},{second}", f"tokens=[{{token: new, model: {second}, like: e}}]"],
        "fisher": [f"models={first},{second}", "method=fisher", f"method.data={rows}", "method.rows=2"],
    }
    for name, values in commands.items():
        done = cli("do", "merge", *values, "--store", str(tmp_path / "s"), "--out", name)
        assert done.returncode == 0, done.stdout + done.stderr
    stacked = load_file(tmp_path / "stack" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stacked[name], load_file(two.path / "model.safetensors")[name])


def test_settings_of_a_slice_stand_for_those_that_do_not_fit_it_and_tokens_are_named_once() -> None:
    two, one = ({"sources": [{"model": "a", "layers": [0, 1]}] * count} for count in (2, 1))
    density = {"per_model": [0.5, 0.6]}
    values = {"base": "b", "method": {"uses": "ties", "density": density}}
    context = {"components": default_registry()}
    MergeConfig.model_validate({**values, "slices": [two, {**one, "settings": {"density": 0.3}}]}, context=context)
    with pytest.raises(ValueError, match="not for 1 models"):
        MergeConfig.model_validate({**values, "slices": [two, one]}, context=context)
    with pytest.raises(ValueError, match="names 'x' twice"):
        MergeConfig.model_validate({"models": ["a"], "tokens": [{"token": "x"}] * 2}, context=context)


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_what_embeds_is_the_first_models_and_the_head_the_last_ones(tmp_path: Path, kind: str) -> None:
    folders = []
    for seed in (1, 2):
        folder = make_gpt2(tmp_path / f"gpt2-{seed}")
        if kind == "neox":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            folder = tmp_path / f"neox-{seed}"
            GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=320, **sizes)).save_pretrained(folder)
            for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
                shutil.copyfile(tmp_path / f"gpt2-{seed}" / text, folder / text)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor + seed for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        folders.append(run_stage(tmp_path / "s", "base", {"source": str(folder)}))
    merged = stacked(tmp_path, [(folders[0], [0, 1]), (folders[1], [1, 2])])
    found, one, two = (load_file(item.path / "model.safetensors") for item in (merged, *folders))
    outside = {name for name in found if ".h." not in name and ".layers." not in name}
    first = {"transformer.wte.weight", "transformer.wpe.weight", "gpt_neox.embed_in.weight"} & outside
    assert len(first) == (2 if kind == "gpt2" else 1)
    for name in outside:
        assert torch.equal(found[name], (one if name in first else two)[name]), name
