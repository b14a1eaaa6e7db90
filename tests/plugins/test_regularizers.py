"""Penalties against forgetting: their values, their gradients, and that they hold what was known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from luthier.api import Artifact
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier.training.encoding import encode_row
from luthier.training.fisher import fisher_of
from luthier.training.moves import LowRank, weights_of

KNOWN = [
    {"messages": [{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": f"{n} {n + 1} {n + 2}"}]}
    for n in range(8)
]
TASK = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "no, never! " * 2}]}
    for n in range(8)
]


def adapted(base: Artifact, *, moved: bool = False) -> Any:
    model = peft.get_peft_model(load_model(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("moved", [False, True])
def test_a_low_rank_adapter_moves_what_it_adds_to(tmp_path: Path, moved: bool) -> None:
    model = adapted(tiny_model(tmp_path), moved=moved)
    weights = weights_of(model)
    assert all(isinstance(weight, LowRank) for weight in weights.values())
    before = {name: weight.layer.get_delta_weight("default").clone() for name, weight in weights.items()}  # type: ignore[union-attr]
    assert all(float(weight.squared()) == pytest.approx(0, abs=1e-4) for weight in weights.values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, weight in weights.items():
        right = weight.layer.get_delta_weight("default") - before[name]  # type: ignore[union-attr]
        torch.testing.assert_close(weight.delta(), right, rtol=1e-4, atol=1e-5)
        assert float(weight.squared()) == pytest.approx(float(right.square().sum()), rel=1e-4)


def test_the_fisher_information_is_the_mean_of_squares_row_by_row(tmp_path: Path) -> None:
    base = tiny_model(tmp_path, tied=False)
    encoder = ChatEncoder(load_tokenizer(base), base.facts["stop_token_ids"])
    rows = [encode_row(encoder, row) for row in KNOWN[:3]]
    model = load_model(base).eval()
    sums: dict[str, torch.Tensor] = {}
    for row in rows:
        item = row.completions[0]
        model.zero_grad()
        labels = torch.tensor([item.labels])
        # transformers' loss is the mean over targets.
        (-row.targets * model(input_ids=torch.tensor([item.input_ids]), labels=labels).loss).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.square() / 3
    found = fisher_of(model, weights_of(model), rows, TestContext())
    assert found.keys() == sums.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, sums[name], rtol=1e-3, atol=1e-6 * float(sums[name].max()) + 1e-12)
    # An adapter that adds nothing yet has the Fisher information of the weights below it.
    light = adapted(base)
    below = fisher_of(light, weights_of(light), rows, TestContext())
    for name, value in below.items():
        plain = name.removeprefix("base_model.model.")
        torch.testing.assert_close(value, sums[plain], rtol=1e-3, atol=1e-6 * float(sums[plain].max()) + 1e-12)


def loss_of(model: Artifact, rows: list[dict[str, Any]]) -> float:
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    loaded = load_model(model).eval()
    losses: list[torch.Tensor] = []
    for row in rows:
        item = encode_row(encoder, row).completions[0]
        with torch.no_grad():
            losses.append(loaded(input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss)
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("adapter", "steps", "rate", "strengths"),
    [(None, 100, 3e-3, (1.0, 100.0)), ({"uses": "lora", "r": 16}, 200, 1e-2, (0.3, 300.0))],
)
def test_what_was_known_is_held_while_the_task_is_learned(
    tmp_path: Path, adapter: Any, steps: int, rate: float, strengths: tuple[float, float]
) -> None:
    base = tiny_model(tmp_path, hidden_size=64)
    known, task = tiny_dataset(tmp_path, KNOWN), tiny_dataset(tmp_path, TASK)
    learned = run_stage(
        tmp_path, "sft", {"steps": 80, "batch_size": 8, "learning_rate": 5e-3}, inputs={"model": base, "data": [known]}
    )
    before = loss_of(learned, KNOWN)
    config: dict[str, Any] = {"steps": steps, "batch_size": 8, "learning_rate": rate, "adapter": adapter}
    found: dict[str, tuple[float, float]] = {}
    for name, regularizers in {
        "none": [],
        "l2sp": [{"uses": "l2sp", "strength": strengths[0]}],
        "ewc": [{"uses": "ewc", "data": str(known.key), "strength": strengths[1]}],
        "replay": [],
    }.items():
        inputs: dict[str, Any] = {"model": learned, "data": [task]}
        if name == "ewc":
            inputs["regularizers.0.data"] = known
        if name == "replay":
            inputs["data"] = [task, known]
        mixed = {"weights": [0.75, 0.25]} if name == "replay" else {}
        tuned = run_stage(tmp_path, "sft", {**config, **mixed, "regularizers": regularizers}, inputs=inputs)
        found[name] = (loss_of(tuned, KNOWN), loss_of(tuned, TASK))
    assert found["none"][0] > before + 0.5
    for name in ("l2sp", "ewc", "replay"):
        assert found[name][0] < before + 0.7 * (found["none"][0] - before), name
        # Most of the task is learned all the same.
        assert loss_of(learned, TASK) - found[name][1] > 0.8 * (loss_of(learned, TASK) - found["none"][1]), name


def test_the_fisher_information_is_kept(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    known, task = tiny_dataset(tmp_path, KNOWN), tiny_dataset(tmp_path, TASK)
    inputs = {"model": base, "data": [task], "regularizers.0.data": known}
    config = {"steps": 1, "batch_size": 8, "learning_rate": 1e-3}
    for strength in (1.0, 2.0):
        regularizers = [{"uses": "ewc", "data": "d", "strength": strength}]
        run_stage(tmp_path, "sft", {**config, "regularizers": regularizers}, inputs=inputs)
    assert len(list((tmp_path / "cache" / "fisher").glob("*.safetensors"))) == 1
    regularizers = [{"uses": "ewc", "data": "d", "rows": 3}]
    run_stage(tmp_path, "sft", {**config, "regularizers": regularizers}, inputs=inputs)
    assert len(list((tmp_path / "cache" / "fisher").glob("*.safetensors"))) == 2
