"""Each optimizer learns, does what its paper says, and goes on from a checkpoint as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from luthier.api import Artifact
from luthier.api.training import Schedule
from luthier.modeling.loading import load_model
from luthier.registry import default_registry
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier.training.optimizers import Together, parameter_groups
from safetensors.torch import load_file

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!" * (n + 1)}]}
    for n in range(8)
]
NAMES = ["adamw", "adamw8bit", "adafactor", "lion", "muon"]


def made(name: str, model: Any, **config: Any) -> tuple[Any, Any]:
    registry = default_registry()
    component: Any = registry.build(registry.use("optimizer", {"uses": name, **config}), TestContext())
    return component.make(model, Schedule(20, 2, 1e-2, "linear", 0.1))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_one_that_trains(tmp_path: Path, name: str) -> None:
    """What a recipe names is used, its settings included."""
    base = tiny_model(tmp_path, hidden_size=64)
    data = tiny_dataset(tmp_path, CHATS)
    config = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1}
    found: list[Artifact] = []
    for optimizer in (name, {"uses": name, **OTHER[name]}):
        found.append(
            run_stage(tmp_path, "sft", {**config, "optimizer": optimizer}, inputs={"model": base, "data": [data]})
        )
    for item in found:
        assert item.facts["training"]["loss_last"] < item.facts["training"]["loss_first"] - 0.05
    weights = [load_file(item.path / "model.safetensors") for item in found]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


OTHER: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.5}, "adamw8bit": {"beta1": 0.5}, "adafactor": {"beta2_decay": -0.3}, "lion": {"beta1": 0.5},
    "muon": {"momentum": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_its_state(tmp_path: Path, name: str) -> None:
    base = tiny_model(tmp_path, hidden_size=64)
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (4, 16))
    results: list[dict[str, torch.Tensor]] = []
    for interrupted in (False, True):
        model = load_model(base).train()
        optimizer, scheduler = made(name, model)
        for step in range(6):
            if interrupted and step == 3:
                torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
                kept = torch.load(tmp_path / "state", weights_only=True)
                model = load_model(base).train()
                optimizer, scheduler = made(name, model)
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
                scheduler.load_state_dict(kept[2])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_moments_of_8_bits_take_a_byte(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, hidden_size=128)).train()
    optimizer, _ = made("adamw8bit", model)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    large = model.model.layers[0].mlp.down_proj.weight
    assert large.numel() >= 4096
    assert {optimizer.state[large][name].dtype for name in ("state1", "state2")} == {torch.uint8}


def test_muon_has_hidden_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, tied=False)).train()
    optimizer, _ = made("muon", model)
    assert isinstance(optimizer, Together)
    by_muon = {id(item) for group in optimizer.parts[0].param_groups for item in group["params"]}
    names = {name for name, item in model.named_parameters() if id(item) in by_muon}
    assert names
    assert all("proj" in name for name in names)
    every = {id(item) for group in optimizer.param_groups for item in group["params"]}
    assert every == {id(item) for item in model.parameters()}


def test_learning_rates_are_scaled_by_name(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path))
    schedule = Schedule(10, 0, 1e-3, "constant", 0.1, scale=lambda name: 4.0 if "q_proj" in name else 1.0)
    groups = parameter_groups(model, schedule)
    rates = {id(item): group["lr"] for group in groups for item in group["params"]}
    decays = {id(item): group["weight_decay"] for group in groups for item in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (4e-3 if "q_proj" in name else 1e-3)
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1)


def test_schedules_have_their_shapes(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    data = tiny_dataset(tmp_path, CHATS)
    rates: dict[str, list[float]] = {}
    for shape in ("linear", "cosine", "constant", "wsd"):
        from luthier.worker import context

        seen: list[float] = []
        inner = context.JobContext.metrics

        def keep(self: Any, values: Any, step: int, seen: list[float] = seen, inner: Any = inner) -> None:
            if "learning_rate" in values:
                seen.append(values["learning_rate"])
            inner(self, values, step)

        context.JobContext.metrics = keep  # type: ignore[method-assign]
        try:
            config = {"steps": 10, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0.2, "log_every": 1, "decay": 0.4}
            config["schedule"] = shape
            run_stage(tmp_path, "sft", config, inputs={"model": base, "data": [data]})
        finally:
            context.JobContext.metrics = inner  # type: ignore[method-assign]
        rates[shape] = seen
    for shape, seen in rates.items():
        assert seen[0] == 0.0, shape
        assert seen[2] == pytest.approx(1e-3), shape
    assert rates["constant"][2:] == pytest.approx([1e-3] * 8)
    assert rates["linear"][6] == pytest.approx(0.5e-3)
    assert rates["cosine"][6] == pytest.approx(0.5e-3)
    assert rates["cosine"][8] < rates["linear"][8]
    assert rates["wsd"][2:7] == pytest.approx([1e-3] * 5)
    assert rates["wsd"][8] == pytest.approx(0.5e-3)
