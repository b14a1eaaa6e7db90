"""The merge stage: which numbers it makes of models, adapters and slices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from luthier.api import Artifact, Needs
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import fold, load_model, load_tokenizer
from luthier.modeling.scoring import scored
from luthier.testing import resealed, run_stage, tiny_dataset, tiny_model
from merged_models import NAME, changed, merged_by, weights

CHATS = [{"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}]}] * 8


def test_the_soup_is_the_mean_in_the_dtype_of_the_first(store: Path, models: list[Artifact]) -> None:
    merged = run_stage(store, "merge", inputs={"models": models[:2]})
    one, two, soup = weights(models[0]), weights(models[1]), weights(merged)
    assert merged.facts["dtype"] == "BF16"
    assert merged.facts["proof"] == {"loaded": "memory", "forward": "finite"}
    for fact in ("tokenizer", "chat_template", "stop_tokens", "stop_token_ids"):
        assert merged.facts[fact] == models[0].facts[fact], "template, tokenizer and stop tokens are carried"
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, ((one[name].float() + two[name].float()) / 2).to(torch.bfloat16))


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


def test_an_adapter_is_merged_on_its_own_model_whatever_else_is(
    store: Path, models: list[Artifact], adapter: Artifact
) -> None:
    merged = run_stage(store, "merge", {"dtype": "float32"}, inputs={"models": [adapter, models[1]]})
    folded, other = fold(load_model(adapter)).state_dict(), weights(models[1])
    torch.testing.assert_close(weights(merged)[NAME], (folded[NAME] + other[NAME].float()) / 2, rtol=1e-4, atol=1e-5)
    assert not merged.manifest["warnings"]


def test_an_adapter_that_does_not_sit_on_the_base_is_reported(
    store: Path, models: list[Artifact], adapter: Artifact
) -> None:
    config = {"method": "task_arithmetic", "dtype": "float32"}
    own = run_stage(store, "merge", config, inputs={"models": [adapter], "base": models[0]})
    assert not own.manifest["warnings"]
    other = run_stage(store, "merge", config, inputs={"models": [adapter], "base": models[1]})
    assert "not on the base" in other.manifest["warnings"][0]


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
            ids = torch.tensor([ChatEncoder(tokenizer).document(row)])
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
        encoder = ChatEncoder(load_tokenizer(artifact), artifact.facts["stop_token_ids"])
        found = scored(load_model(artifact), encoder, rows, [Needs(token_logps=True)], store)
        return -sum(sum(row.logps) for row in found) / sum(len(row.logps) for row in found)

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


def stacked(models: list[Artifact]) -> dict[str, Artifact]:
    """The inputs of two slices."""
    return {f"slices.{place}.sources.0.model": model for place, model in enumerate(models)}


def test_a_layer_scaled_to_nothing_changes_nothing(store: Path, models: list[Artifact]) -> None:
    nothing = [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]
    slices = [{"sources": [{"layers": [0, 2]}]}, {"sources": [{"layers": [1, 2], "scale": nothing}]}]
    merged = run_stage(store, "merge", {"method": "passthrough", "slices": slices}, inputs=stacked([models[0]] * 2))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        before, after = (load_model(item)(input_ids=ids).logits for item in (models[0], merged))
    assert merged.facts["tensors"] > models[0].facts["tensors"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_alpha_patterns_are_the_regular_expressions_that_peft_takes_them_for(tmp_path: Path, adapter: Artifact) -> None:
    folder = tmp_path / adapter.key
    shutil.copytree(adapter.path, folder)
    shutil.copytree(adapter.base.path, tmp_path / adapter.base.key)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"model\.layers\.0\..*q_proj": 40, "v_proj": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    odd = resealed(folder)
    found = merged_by(tmp_path, [odd], None, {"uses": "passthrough"})
    folded = fold(load_model(odd)).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-4, atol=1e-5)


def test_where_all_weights_are_zero_a_method_with_a_base_changes_nothing(store: Path, models: list[Artifact]) -> None:
    inputs = {"models": models[:2], "base": models[2]}
    for name in ("task_arithmetic", "dare_linear", "ties", "iso_c"):
        method = {"uses": name, **({} if name == "iso_c" else {"normalize": True})}
        config = {"method": method, "weights": [[0.0, 1.0], [0.0, 1.0]], "dtype": "float32"}
        merged = weights(run_stage(store, "merge", config, inputs=inputs))
        first, last = NAME, NAME.replace("layers.0", "layers.1")
        torch.testing.assert_close(merged[first], weights(models[2])[first].float())
        assert not torch.equal(merged[last], weights(models[2])[last].float())


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
