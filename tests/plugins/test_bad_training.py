"""What cannot be trained here is refused before training starts, with what to do instead."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from luthier import plan
from luthier.api import ModelError
from luthier.api.estimates import Shape, Training, activations, memory_of
from luthier.modeling.loading import load_model
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.training import memory, tuning
from luthier_plugins.optimizers.adamw import Adamw8bit

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(8)
]


def tuned(folder: Path, **config: Any) -> Any:
    inputs = {"model": tiny_model(folder), "data": [tiny_dataset(folder, CHATS)]}
    return run_stage(folder, "sft", {"steps": 1, "batch_size": 4, **config}, inputs=inputs)


def test_a_model_without_a_chat_template_is_refused_while_planning(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "made")
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in base.path.iterdir():
        if path.name not in ("chat_template.jinja", "manifest.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    recipe = tmp_path / "bare.yaml"
    stages = "  base: {uses: base, source: ./plain}\n  data: {uses: data, source: rows.jsonl}\n"
    recipe.write_text(f"luthier: 1\nstages:\n{stages}  tuned: {{uses: sft, model: base, data: data, steps: 1}}\n")
    with pytest.raises(Exception, match="the model has no chat template") as caught:
        plan(recipe, tmp_path / "s")
    # What it says to do is a stage that can be planned.
    advice = str(caught.value).partition("`with-template: ")[2].partition("`")[0].replace("MODEL", "base")
    recipe.write_text(
        f"luthier: 1\nstages:\n{stages}  dressed: {advice}\n"
        "  tuned: {uses: sft, model: dressed, data: data, steps: 1}\n"
    )
    assert plan(recipe, tmp_path / "s").nodes["dressed"].status == "run"


def test_a_model_that_is_too_large_for_the_machine_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path)
    weights = base.facts["parameters"]
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=12 * weights, available=10**9))
    with pytest.raises(ModelError, match=r"training it takes .* GB of memory without a single row") as caught:
        tuned(tmp_path)
    assert "qlora" in str(caught.value.hint)
    assert tuned(tmp_path, adapter={"uses": "lora", "r": 1}, precision="fp32").kind == "adapter"
    # What is trained of it is not known beforehand.
    assert tuned(tmp_path, train=["*.q_proj.weight"]).kind == "model"


@pytest.mark.parametrize("config", [{"precision": "bf16"}, {"dtype": "bf16", "adapter": {"uses": "lora"}}])
def test_a_precision_that_the_gpu_lacks_is_refused(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "has_bf16", lambda: False)
    use = default_registry().use("stage", {"uses": "sft", "model": "m", "data": "d", **config})
    with pytest.raises(ModelError, match="this GPU has no bfloat16"):
        tuning._precision(use.config, None, SimpleNamespace(device="cuda"))  # type: ignore[arg-type]


def test_an_optimizer_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ModelError, match="bitsandbytes has no 8-bit optimizer for this machine"):
        Adamw8bit(None, None).make(None, None)  # type: ignore[arg-type]


def test_an_adapter_under_another_is_refused_with_both_ways_out() -> None:
    use = default_registry().use("stage", {"uses": "sft", "model": "m", "data": "d", "adapter": "lora"})
    config: Any = use.config
    (told,) = config.kind_problems({"model": ["adapter"], "data": ["dataset"]})
    assert "leave `adapter` out to train it further" in told
    assert "{uses: merge, models: [ADAPTER], method: passthrough}" in told


def test_a_model_s_facts_have_its_shape(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    shape = Shape.of(base.facts)
    assert shape is not None
    model = load_model(base)
    assert shape.parameters == model.num_parameters()
    assert (shape.width, shape.layers) == (model.config.hidden_size, model.config.num_hidden_layers)
    made = tuned(tmp_path, adapter={"uses": "lora", "r": 3})
    assert made.facts["training"]["trained"]["parameters"] == 3 * shape.sides
    inside = [value for name, value in model.named_parameters() if ".layers." in name and value.ndim > 1]
    assert shape.outside == shape.parameters - sum(value.numel() for value in inside)


def test_memory_is_weights_gradients_states_and_activations() -> None:
    shape = Shape(parameters=1000, width=8, inner=16, layers=2, sides=100, outside=400)
    full = Training(rank=None, base="fp32", halves=False, optimizer="adamw", pass_tokens=0, kept=True)
    assert memory_of(shape, full) == 16_000
    lora = Training(rank=2, base="bf16", halves=True, optimizer="adamw8bit", pass_tokens=10, kept=True)
    assert memory_of(shape, lora) == 2000 + 200 * 10 + 3 * 4 * 10 * 400 // 8 + 10 * activations(shape, lora)
    working = replace(full, pass_tokens=10)
    assert memory_of(shape, working) == 16_000 + 8 * 400 + 3 * 4 * 10 * 400 // 8 + 10 * activations(shape, full)
    assert activations(shape, lora) == 2 * 2 * (16 * 8 + 5 * 16)
    qlora = Training(rank=2, base="4bit", halves=True, optimizer="adamw", pass_tokens=0, kept=True)
    assert memory_of(shape, qlora) == round(600 * 0.52 + 400 * 2 + 200 * 16)
