"""Mixtures of experts: routers alone, experts alone, and how tokens are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATS, rows_of
from gguf_models import make_model
from luthier.api import Artifact, ModelError
from luthier.modeling.loading import load_model
from luthier.registry import default_registry
from luthier.reporting.tables import receipt
from luthier.testing import run_stage, tiny_dataset
from luthier.training.experts import expert_layers, load_of, router_weights

STEPS = {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "weight_decay": 0.5}
FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2"]


def model_of(folder: Path, name: str = "mixtral") -> Artifact:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return run_stage(folder, "base", {"source": str(make_model(folder / name, name, **sizes))})


def tuned(folder: Path, model: Artifact, **config: Any) -> Artifact:
    return run_stage(folder, "sft", {**STEPS, **config}, inputs={"model": model, "data": [tiny_dataset(folder, CHATS)]})


def moved(before: Artifact, after: Artifact) -> dict[str, torch.Tensor]:
    """The parameters that are others than before: whether each row is, shape (rows,)."""
    old, new = (dict(load_model(item).named_parameters()) for item in (before, after))
    found = {name: (old[name] != new[name]).flatten(1).any(1) for name in old if old[name].ndim > 1}
    found |= {name: (old[name] != new[name]).any()[None] for name in old if old[name].ndim == 1}
    return {name: rows for name, rows in found.items() if bool(rows.any())}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_alone(tmp_path: Path, family: str) -> None:
    model = model_of(tmp_path, family)
    made = tuned(tmp_path, model, train=["routers"])
    assert set(moved(model, made)) == set(router_weights(load_model(model))) != set()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "lion", "muon"])
def test_experts_that_are_not_chosen_do_not_move(tmp_path: Path, optimizer: str) -> None:
    model = model_of(tmp_path)
    made = tuned(tmp_path, model, experts={"named": {0: [1, 6], 1: [3]}}, optimizer={"uses": optimizer})
    found = moved(model, made)
    assert all("experts" in name for name in found)
    for name, rows in found.items():
        assert set(rows.nonzero()[:, 0].tolist()) <= ({1, 6} if ".0." in name else {3}), name
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    facts = made.facts["training"]["trained"]
    everything = sum(
        item.numel() for name, item in load_model(model).named_parameters() if "experts" in name and ".0." in name
    )
    assert facts["parameters"] == everything * 3 // 8
    assert {expert for numbers in facts.get("experts_without_gradient", {}).values() for expert in numbers} <= {1, 3, 6}


def test_chosen_experts_are_trained_as_whole_layers_are(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    whole = tuned(tmp_path, model, train=["*.experts.*"])
    chosen = tuned(tmp_path, model, experts={"named": list(range(8))})
    for (name, one), other in zip(load_model(whole).named_parameters(), load_model(chosen).parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=name)
    assert len(moved(model, whole)) == 4
    # Weight decay is on: without it they would be elsewhere.
    free = tuned(tmp_path, model, experts={"named": list(range(8))}, weight_decay=0.0)
    pairs = zip(load_model(free).parameters(), load_model(chosen).parameters(), strict=True)
    assert max(float((one - other).abs().max()) for one, other in pairs) > 1e-4


def test_the_other_weights_that_a_recipe_names_are_trained_beside_them(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    found = moved(model, tuned(tmp_path, model, experts={"named": [0]}, train=["*.q_proj.weight"]))
    assert {name.rpartition("self_attn.")[2] for name in found if "experts" not in name} == {"q_proj.weight"}
    assert any("experts" in name for name in found)


@pytest.mark.parametrize("by", ["tokens", "weights"])
def test_the_most_used_experts_are_those_that_the_router_sends_most_to(tmp_path: Path, by: str) -> None:
    model = model_of(tmp_path)
    rows = rows_of(model, CHATS)
    loaded = load_model(model)
    totals = torch.zeros(2, 8)
    for row in rows:
        ids = torch.tensor([row.completions[0].input_ids])
        for layer, logits in enumerate(loaded(input_ids=ids, output_router_logits=True).router_logits):
            weights, places = logits.softmax(-1).topk(2, -1)
            weights = weights / weights.sum(-1, keepdim=True)
            value = torch.ones_like(weights) if by == "tokens" else weights.detach()
            totals[layer].index_add_(0, places.flatten(), value.flatten())
    loads = load_of(loaded, rows)
    assert [name.split(".")[2] for name in loads] == ["0", "1"]
    for load, total in zip(loads.values(), totals, strict=True):
        torch.testing.assert_close(load.shares(by), total / total.sum())
    made = tuned(tmp_path, model, experts={"share": 0.6, "by": by})
    right: dict[int, set[int]] = {}
    for layer, total in enumerate(totals):
        order = total.argsort(descending=True, stable=True).tolist()
        enough = next(n for n in range(1, 9) if total[order[:n]].sum() >= 0.6 * total.sum())
        right[layer] = set(order[:enough])
        assert enough < 8
    for name, some in moved(model, made).items():
        assert set(some.nonzero()[:, 0].tolist()) <= right[int(name.split(".")[2])]
    assert made.facts["training"]["trained"]["share"] < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_receipt_says_how_tokens_were_shared_out(tmp_path: Path, family: str) -> None:
    model = model_of(tmp_path, family)
    training = tuned(tmp_path, model).facts["training"]
    load = training["router_load"]
    layers = expert_layers(load_model(model))
    assert set(load["before"]) == set(load["after"]) == set(layers) != set()
    for shares in (*load["before"].values(), *load["after"].values()):
        assert sum(shares) == pytest.approx(1, abs=2e-3)
    assert load["before"] != load["after"]
    assert any("router: the busiest expert takes" in line.plain for line in receipt(training))


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        ({"named": [9]}, "expert 9 of block 0, which has 8"),
        ({"named": {5: [0]}}, "block 5, which has none"),
    ],
)
def test_experts_that_are_not_there_are_refused(tmp_path: Path, experts: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        tuned(tmp_path, model_of(tmp_path), experts=experts)


def test_a_model_without_experts_has_none_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this model has none"):
        tuned(tmp_path, model_of(tmp_path, "llama"), experts={"named": [0]})
    with pytest.raises(ModelError, match="'routers', which no weight matches"):
        tuned(tmp_path, model_of(tmp_path, "llama"), train=["routers"])


@pytest.mark.parametrize(
    "values",
    [
        {"experts": {}},
        {"experts": {"named": [0], "share": 0.5}},
        {"experts": {"named": []}},
        {"experts": {"named": {0: []}}},
        {"experts": {"named": [-1]}},
        {"experts": {"named": [0]}, "adapter": "lora"},
    ],
)
def test_choices_that_say_nothing_or_too_much_are_refused_while_planning(values: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"`named`|counted from 0|leave `experts`"):
        default_registry().use("stage", {"uses": "sft", "model": "m", "data": "d", **values})
