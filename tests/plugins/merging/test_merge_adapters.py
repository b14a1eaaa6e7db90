"""Adapters with each other, adapters out of models, experts out of models, and models compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import make_model
from luthier.api import Artifact, ModelError, RecipeError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.merging import pool
from luthier.merging.parts import Noise, merge_tensors
from luthier.merging.reader import content_of
from luthier.modeling.loading import fold, load_model
from luthier.registry import default_registry
from luthier.testing import resealed, run_stage, tiny_dataset, tiny_model
from luthier_plugins.merge.diff.stage import _by_layer
from luthier_plugins.merge.moe.config import MoeConfig
from safetensors.torch import load_file, save_file

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}]} for n in range(8)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def base(store: Path) -> Artifact:
    """A model."""
    return tiny_model(store, dtype="float32", tied=False)


@pytest.fixture(scope="module")
def adapters(store: Path, base: Artifact) -> list[Artifact]:
    """Two adapters of other ranks on it, the second on fewer layers."""
    made: list[Artifact] = []
    for place, adapter in enumerate(({"r": 4}, {"r": 2, "target_modules": ["q_proj", "up_proj"]})):
        data = tiny_dataset(store, CHATS[place::2])
        config = {"adapter": {"uses": "lora", **adapter}, "steps": 6, "learning_rate": 0.05}
        made.append(run_stage(store, "sft", config, inputs={"model": base, "data": [data]}))
    return made


def full(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All weights of a model, or of an adapter folded by PEFT."""
    return {name: tensor.clone() for name, tensor in fold(load_model(artifact)).state_dict().items()}


@pytest.mark.parametrize("space", ["cat", "core", "delta"])
def test_the_linear_merge_of_adapters_is_exact(
    store: Path, base: Artifact, adapters: list[Artifact], space: str
) -> None:
    config = {"space": space, "weights": [1.0, 3.0]}
    merged = run_stage(store, "merge_adapters", config, inputs={"models": adapters})
    assert merged.kind == "adapter"
    assert merged.facts["r"] == 6
    assert merged.base.key == base.key
    one, two, plain, found = full(adapters[0]), full(adapters[1]), full(base), full(merged)
    for name, tensor in found.items():
        expected = plain[name] + 0.25 * (one[name] - plain[name]) + 0.75 * (two[name] - plain[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_ties_in_the_full_space_is_ties_of_the_folded_models(
    store: Path, base: Artifact, adapters: list[Artifact]
) -> None:
    method = {"uses": "ties", "density": 0.4}
    config = {"space": "delta", "method": method, "r": 64}
    merged = run_stage(store, "merge_adapters", config, inputs={"models": adapters})
    models = run_stage(
        store, "merge", {"method": method, "dtype": "float32"}, inputs={"models": adapters, "base": base}
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    exact, plain = load_file(models.path / "model.safetensors")[name], full(base)[name]
    found = full(merged)[name]
    # The update is cut to the rank that both have together: no other update of that rank is nearer.
    u, s, vh = torch.linalg.svd(exact - plain)
    nearest = (u[:, :6] * s[:6]) @ vh[:6]
    torch.testing.assert_close(found - plain, nearest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "task_arithmetic", "iso_c"])
def test_every_method_merges_in_the_core_space(store: Path, adapters: list[Artifact], method: str) -> None:
    config = {"space": "core", "method": method, "r": 4}
    merged = run_stage(store, "merge_adapters", config, inputs={"models": adapters})
    assert merged.facts["r"] == 4
    assert 0 < merged.facts["kept"] <= 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in full(merged).values())


@pytest.mark.parametrize(
    "method",
    [
        {"uses": "ties", "density": 0.4},
        {"uses": "dare_linear", "density": 0.5},
        {"uses": "task_arithmetic", "scale": 0.5},
        {"uses": "iso_c"},
        {"uses": "tsv_m"},
    ],
    ids=lambda value: value["uses"],
)
@pytest.mark.parametrize("space", ["core", "delta"])
def test_what_is_merged_in_a_space_is_what_the_method_makes_there(
    store: Path, base: Artifact, adapters: list[Artifact], method: dict, space: str
) -> None:
    given = None if method["uses"] == "tsv_m" else [1.0, 2.0]
    config = {"space": space, "method": method, "weights": given}
    merged = run_stage(store, "merge_adapters", config, inputs={"models": adapters}, seed=5)
    assert merged.facts["r"] <= 6, "what both have together"
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = full(base)[name]
    updates = [full(adapter)[name] - plain for adapter in adapters]
    registry = default_registry()
    component = registry.get("merge_method", method["uses"])
    values = {key: value for key, value in method.items() if key != "uses"}
    made = registry.impl_class(component)(registry.config_class(component)(**values), None)
    noise = Noise(5, [content_of(adapter) for adapter in adapters], name)

    def by_method(several: list[torch.Tensor]) -> torch.Tensor:
        return merge_tensors(made, several, given, torch.zeros_like(several[0]), name=name, depth=1.0, noise=noise)

    if space == "delta":
        expected = by_method(updates)
    else:
        # The space that the factors span together, with the same bases: QR of the factors side by side.
        pairs = [load_file(adapter.path / "adapter_model.safetensors") for adapter in adapters]
        start = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        scales = [
            settings["lora_alpha"] / settings["r"]
            for settings in (json.loads((adapter.path / "adapter_config.json").read_text()) for adapter in adapters)
        ]
        left = torch.linalg.qr(
            torch.cat(
                [pair[f"{start}B.weight"].float() * scale for pair, scale in zip(pairs, scales, strict=True)], dim=1
            )
        )[0]
        right = torch.linalg.qr(torch.cat([pair[f"{start}A.weight"].float() for pair in pairs], dim=0).T)[0]
        expected = left @ by_method([left.T @ update @ right for update in updates]) @ right.T
    u, s, vh = torch.linalg.svd(expected)
    nearest = (u[:, :6] * s[:6]) @ vh[:6]
    torch.testing.assert_close(full(merged)[name] - plain, nearest, rtol=1e-3, atol=2e-4)


def test_adapters_on_different_models_are_refused(store: Path, adapters: list[Artifact], tmp_path: Path, cli) -> None:
    other = tiny_model(store, seed=9, dtype="float32", tied=False)
    data = tiny_dataset(store, CHATS)
    foreign = run_stage(store, "sft", {"adapter": "lora", "steps": 1}, inputs={"model": other, "data": [data]})
    dora = run_stage(store, "sft", {"adapter": "dora", "steps": 1}, inputs={"model": other, "data": [data]})
    told = cli("do", "merge_adapters", f"models={adapters[0].path},{foreign.path}")
    assert "the adapters sit on different models" in told.stderr
    assert "merge it as a model" in cli("do", "merge_adapters", f"models={dora.path},{dora.path}").stderr
    assert "exact for linear only" in cli("do", "merge_adapters", f"models={dora.path}", "method=ties").stderr


def test_an_extracted_adapter_of_full_rank_is_the_tuned_model(store: Path, base: Artifact) -> None:
    data = tiny_dataset(store, CHATS)
    tuned = run_stage(store, "sft", {"steps": 4, "learning_rate": 1e-3}, inputs={"model": base, "data": [data]})
    whole = run_stage(store, "extract_lora", {"r": 4096}, inputs={"model": tuned, "base": base})
    assert whole.facts["kept"] == pytest.approx(1)
    assert any("layernorm" in name for name in whole.facts["left_out"])
    assert "change is lost" in whole.manifest["warnings"][0]
    expected, found = full(tuned), full(whole)
    for name, tensor in found.items():
        if name not in whole.facts["left_out"]:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    small = run_stage(store, "extract_lora", {"energy": 0.6}, inputs={"model": tuned, "base": base})
    ranks = small.facts["ranks"]
    assert 1 <= ranks["smallest"] <= ranks["largest"] < 64
    assert 0.6 <= small.facts["kept"] < 1
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        delta, kept = expected[name] - full(base)[name], full(small)[name] - full(base)[name]
        assert float(kept.square().sum() / delta.square().sum()) >= 0.6 - 1e-3


def test_adapters_have_the_same_bits_on_any_number_of_cores(
    store: Path, base: Artifact, adapters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = [tiny_model(store, seed=seed, dtype="float32", hidden_size=256, intermediate_size=512) for seed in range(2)]
    jobs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("extract_lora", {"r": 8}, {"model": wide[0], "base": wide[1]}),
        ("merge_adapters", {"space": "delta", "r": 3}, {"models": adapters}),
        ("merge_adapters", {"space": "core", "r": 3}, {"models": adapters}),
    ]
    before = torch.get_num_threads()
    for stage, config, inputs in jobs:
        found: list[bytes] = []
        for count in (1, 2, 5):
            monkeypatch.setattr(pool, "cores", lambda count=count: count)
            torch.set_num_threads(count)
            made = run_stage(store, stage, config, inputs=inputs)
            found.append((made.path / ADAPTER_WEIGHTS).read_bytes())
            assert torch.get_num_threads() == count, "left as it was"
        torch.set_num_threads(before)
        assert found[0] == found[1] == found[2]


def test_an_adapter_needs_to_know_how_much_to_keep(base: Artifact) -> None:
    from luthier import Recipe

    with pytest.raises(RecipeError, match="say how much to keep"):
        Recipe.from_mapping({"luthier": 1, "stages": {"x": {"uses": "extract_lora", "model": "./a", "base": "./b"}}})
    with pytest.raises(ModelError, match="no linear layer differs"):
        run_stage(base.path.parents[1], "extract_lora", {"r": 2}, inputs={"model": base, "base": base})


def test_equal_experts_behind_a_router_without_preference_are_the_dense_model(store: Path, base: Artifact) -> None:
    config = {"router": "uniform", "experts": [{}, {}, {}], "experts_per_token": 2}
    inputs = {"base": base, **{f"experts.{place}.model": base for place in range(3)}}
    experts = run_stage(store, "moe", config, inputs=inputs)
    assert experts.facts["architecture"] == "MixtralForCausalLM"
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        dense, sparse = (load_model(item)(input_ids=ids).logits for item in (base, experts))
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "made", "used"),
    [("qwen2", "Qwen2MoeForCausalLM", 3), ("qwen2", "Qwen2MoeForCausalLM", 2), ("qwen3", "Qwen3MoeForCausalLM", 2)],
)
def test_models_of_qwen_become_a_mixture_of_qwen(tmp_path: Path, name: str, made: str, used: int) -> None:
    store = tmp_path / "s"
    dense = run_stage(store, "base", {"source": str(make_model(tmp_path / "a", name))})
    other = run_stage(store, "base", {"source": str(make_model(tmp_path / "b", name, initializer_range=0.03))})
    config = {"router": "uniform", "experts": [{}, {}, {}], "experts_per_token": used}
    alike = run_stage(store, "moe", config, inputs={"base": dense, **{f"experts.{n}.model": dense for n in range(3)}})
    assert alike.facts["architecture"] == made
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected, found = (load_model(item)(input_ids=ids).logits for item in (dense, alike))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if (name, used) == ("qwen2", 2):
        with pytest.raises(ModelError, match="no qwen2moe with norm_topk_prob"):
            run_stage(store, "export", {"format": "gguf"}, inputs={"model": alike})
    else:
        export = run_stage(store, "export", {"format": {"uses": "gguf", "types": ["F32"]}}, inputs={"model": alike})
        assert export.facts["files"]["F32"]["kl"] < 1e-5
    config = {"router": "prompts", "experts": [{"prompts": ["open"]}, {"prompts": ["12"]}], "experts_per_token": 1}
    mixed = run_stage(store, "moe", config, inputs={"base": dense, "experts.0.model": dense, "experts.1.model": other})
    there, source = full(mixed), full(other)
    down = "model.layers.1.mlp.{}down_proj{}"
    assert torch.equal(there[down.format("experts.", "")][1], source[down.format("", ".weight")])
    data = tiny_dataset(store, CHATS)
    tuned = run_stage(store, "sft", {"steps": 2, "learning_rate": 1e-3}, inputs={"model": mixed, "data": [data]})
    shared = "model.layers.1.mlp.shared_expert.down_proj.weight"
    assert (shared in there) == (name == "qwen2")
    if shared in there:
        assert not there[shared].any()
        assert full(tuned)[shared].any(), "what is silent can learn"


def test_routers_at_random_differ_by_seed(store: Path, base: Artifact) -> None:
    config = {"router": "random", "experts": [{}, {}, {}], "experts_per_token": 1, "dtype": "float32"}
    inputs = {"base": base, **{f"experts.{place}.model": base for place in range(3)}}
    gates = [
        full(run_stage(store, "moe", config, inputs=inputs, seed=seed))["model.layers.1.mlp.gate.weight"]
        for seed in (1, 2)
    ]
    assert not torch.equal(*gates)
    for gate in gates:
        assert float(gate.std()) == pytest.approx(0.02, rel=0.3)
        assert abs(float(gate.mean())) < 0.01


def test_one_mixture_is_made_of_one_family() -> None:
    config = MoeConfig.model_validate({"base": "a", "router": "uniform", "experts": [{"model": "a"}, {"model": "b"}]})

    def told(*architectures: str) -> list[str]:
        return config.input_problems({"models": [{"architecture": name} for name in architectures]})

    assert told("LlamaForCausalLM", "MistralForCausalLM") == []
    assert told("Qwen3ForCausalLM", "Qwen3ForCausalLM") == []
    assert told("LlamaForCausalLM", "Qwen3ForCausalLM") == [
        "one mixture cannot hold LlamaForCausalLM and Qwen3ForCausalLM"
    ]
    assert "not of GemmaForCausalLM" in told("LlamaForCausalLM", "GemmaForCausalLM")[0]


def test_routers_send_prompts_to_their_experts(store: Path, base: Artifact) -> None:
    other = tiny_model(store, seed=4, dtype="float32", tied=False)
    prompts = [["open the door", "close the window"], ["12 + 30", "7 * 8 - 2"]]
    config = {"router": "prompts", "experts": [{"prompts": text} for text in prompts], "experts_per_token": 1}
    experts = run_stage(store, "moe", config, inputs={"base": base, "experts.0.model": base, "experts.1.model": other})
    from luthier.modeling.loading import load_tokenizer

    model, tokenizer = load_model(experts), load_tokenizer(experts)
    wins = 0
    for place, texts in enumerate(prompts):
        for text in texts:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), output_router_logits=True)
            wins += int(out.router_logits[0].mean(dim=0).argmax()) == place
    assert wins == 4
    first = [load_file(path / "model.safetensors") for path in (experts.path, other.path)]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first[0]["model.layers.1.block_sparse_moe.experts.1.w2.weight"], first[1][name])


def test_diff_shows_what_is_alike(store: Path, base: Artifact) -> None:
    data = tiny_dataset(store, CHATS)
    tuned = [
        run_stage(store, "sft", {"steps": steps, "learning_rate": 1e-3}, inputs={"model": base, "data": [data]})
        for steps in (4, 8)
    ]
    report = run_stage(store, "diff", inputs={"models": tuned, "base": base})
    content = json.loads((report.path / "report.json").read_text())
    one, two, plain = (full(item) for item in (*tuned, base))
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = one[name] - plain[name], two[name] - plain[name]
    row = list(content["tensors"][name].values())
    assert row[0] == pytest.approx(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-4)
    both = (a != 0) & (b != 0)
    assert row[1] == pytest.approx(float((a.sign() == b.sign())[both].float().mean()), abs=1e-4)
    assert row[2] == pytest.approx(float(a.norm() / plain[name].norm()), rel=1e-4)
    assert {"whole", "layers", "tensors"} <= set(content)
    html = (report.path / "report.html").read_text()
    assert name in html
    assert "layer 1" in html
    light = run_stage(
        store,
        "sft",
        {"adapter": {"uses": "lora", "target_modules": ["q_proj"]}, "steps": 2, "learning_rate": 0.05},
        inputs={"model": base, "data": [data]},
    )
    partly = run_stage(store, "diff", inputs={"models": [light, tuned[0]], "base": base})
    content = json.loads((partly.path / "report.json").read_text())
    assert list(content["tensors"][name].values())[:3] == [None, None, 0], "what one has not changed tells nothing"
    query = content["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    assert all(value is not None for value in query.values())
    assert "<td>-</td>" in (partly.path / "report.html").read_text()
    three = run_stage(store, "diff", inputs={"models": [*tuned, light], "base": base})
    content = json.loads((three.path / "report.json").read_text())
    assert len(content["whole"]) == 3 * 2 + 3, "two numbers a pair, and a norm each"
    parts = [key for key in plain if key.startswith("model.layers.1.")]
    left, right, whole = (
        torch.cat([values[key].flatten() - zero[key].flatten() for key in parts])
        for values, zero in ((one, plain), (two, plain), (plain, {k: v * 0 for k, v in plain.items()}))
    )
    row = content["layers"]["layer 1"]
    first, second = content["models"][:2]
    assert row[f"cosine {first}, {second}"] == pytest.approx(
        float(torch.cosine_similarity(left, right, dim=0)), abs=1e-3
    )
    assert row[f"norm {first}"] == pytest.approx(float(left.norm() / whole.norm()), rel=1e-3)
    assert row[f"norm {second}"] == pytest.approx(float(right.norm() / whole.norm()), rel=1e-3)
    same = run_stage(store, "diff", inputs={"models": [base, base]})
    content = json.loads((same.path / "report.json").read_text())
    assert next(iter(content["whole"].values())) == pytest.approx(1)
    assert content["models"] == ["init", "init 2"]


def test_layers_of_several_stacks_are_distinguished() -> None:
    sums = {
        f"{stack}.layers.{layer}.w": torch.full((3, 2, 3), float(layer + 1))
        for stack in ("vision", "text")
        for layer in range(2)
    }
    found = _by_layer(sums)
    assert {name: float(value[0, 0, 0]) for name, value in found.items()} == {
        "vision.layers layer 0": 1,
        "vision.layers layer 1": 2,
        "text.layers layer 0": 1,
        "text.layers layer 1": 2,
    }


def test_methods_of_mergekit_merge_adapters(store: Path, adapters: list[Artifact]) -> None:
    def merged(method: dict) -> Artifact:
        return run_stage(store, "merge_adapters", {"space": "delta", "method": method}, inputs={"models": adapters})

    for name, parameters in (("linear", {"normalize": True}), ("task_arithmetic", {"lambda": 1.0})):
        theirs = {"uses": "mergekit", "name": name, "parameters": parameters}
        one, two = full(merged({"uses": name})), full(merged(theirs))
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_what_an_adapter_cannot_hold_is_not_extracted(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = run_stage(store, "base", {"source": str(make_model(tmp_path / "mixed", "mixtral"))})
    data = tiny_dataset(store, CHATS)
    tuned = run_stage(store, "sft", {"steps": 2, "learning_rate": 1e-3}, inputs={"model": base, "data": [data]})
    made = run_stage(store, "extract_lora", {"r": 4}, inputs={"model": tuned, "base": base})
    assert any("experts.1.w2" in name for name in made.facts["left_out"])
    assert any(".gate." in name for name in made.facts["left_out"])
    positions = make_opt(tmp_path / "opt")
    base = run_stage(store, "base", {"source": str(positions)})
    tuned = run_stage(store, "sft", {"steps": 2, "learning_rate": 1e-3}, inputs={"model": base, "data": [data]})
    made = run_stage(store, "extract_lora", {"r": 4}, inputs={"model": tuned, "base": base})
    assert "model.decoder.embed_positions.weight" in made.facts["left_out"]
    assert json.loads((made.path / "adapter_config.json").read_text())["target_modules"]


def make_opt(folder: Path) -> Path:
    """A model with a table of positions."""
    from transformers import OPTConfig, OPTForCausalLM

    OPTForCausalLM(
        OPTConfig(
            vocab_size=320,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / text).write_text((tiny_model(folder.parent / "t").path / text).read_text())
    return folder


def test_the_whole_numbers_of_a_dense_model_are_carried(store: Path, base: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / base.key
    shutil.copytree(base.path, folder)
    steps = torch.tensor([3, 2**40 + 1])
    save_file({**load_file(base.path / "model.safetensors"), "model.steps": steps}, folder / "model.safetensors")
    odd = resealed(folder)
    config = {"router": "uniform", "experts": [{}, {}], "experts_per_token": 1, "dtype": "bfloat16"}
    inputs = {"base": odd, "experts.0.model": odd, "experts.1.model": odd}
    # transformers has no place for it, which is reported; but it was written as it is.
    with pytest.raises(ModelError, match=r"unexpected keys: .'model.steps'") as told:
        run_stage(store, "moe", config, inputs=inputs)
    assert torch.equal(load_file(Path(str(told.value.where)) / "model.safetensors")["model.steps"], steps)
