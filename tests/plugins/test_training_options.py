"""Every option of a training stage does what its docstring says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from luthier.api import Artifact, ModelError
from luthier.modeling import precision
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.worker import context as contexts
from safetensors.torch import load_file

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}" * (1 + n % 3)},
            {"role": "assistant", "content": f"{n}!" * (n + 1)},
        ]
    }
    for n in range(8)
]
STEPS = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1}


def tuned(folder: Path, **config: Any) -> Artifact:
    inputs = {"model": tiny_model(folder), "data": [tiny_dataset(folder, CHATS)]}
    return run_stage(folder, "sft", {**STEPS, **config}, inputs=inputs)


def split(folder: Path, validation: float = 0.5) -> Artifact:
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in CHATS * 2))
    return run_stage(folder, "data", {"source": str(source), "split": {"validation": validation}})


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, float]]]:
    """What stages log, with the step."""
    found: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(contexts.JobContext, "metrics", lambda self, values, step: found.append((step, dict(values))))
    return found


def test_what_saves_memory_or_time_changes_no_number(tmp_path: Path) -> None:
    plain = tuned(tmp_path).facts["training"]
    for config in (
        {"gradient_checkpointing": True},
        {"attention": "eager"},
        {"attention": "sdpa"},
        {"micro_batch_size": 3},
    ):
        other = tuned(tmp_path, **config).facts["training"]
        assert other["loss_last"] == pytest.approx(plain["loss_last"], rel=1e-4), config


def test_activations_are_computed_twice_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    calls: list[Any] = []
    inner = PreTrainedModel.gradient_checkpointing_enable
    monkeypatch.setattr(
        PreTrainedModel,
        "gradient_checkpointing_enable",
        lambda self, *args, **named: (calls.append(1), inner(self, *args, **named))[1],
    )
    tuned(tmp_path, gradient_checkpointing=False)
    tuned(tmp_path, gradient_checkpointing="auto")
    assert not calls
    tuned(tmp_path, gradient_checkpointing=True)
    tuned(tmp_path, gradient_checkpointing=True, adapter={"uses": "lora", "r": 2})
    assert len(calls) == 2
    # Where one row would not fit, `auto` turns it on.
    from luthier.training import run

    monkeypatch.setattr(run, "fits", lambda *_: False)
    tuned(tmp_path, gradient_checkpointing="auto", seed=5)
    assert len(calls) == 3


def test_gradients_are_clipped(tmp_path: Path, logged: list[tuple[int, dict[str, float]]]) -> None:
    # With a large epsilon, Adam's updates are as large as the gradients.
    weights: list[dict[str, torch.Tensor]] = []
    for norm in (0.0, 1.0, 1e-3):
        made = tuned(tmp_path, max_grad_norm=norm, steps=2, optimizer={"uses": "adamw", "eps": 1.0}, save_dtype="fp32")
        weights.append(load_file(made.path / "model.safetensors"))
    before = load_file(tiny_model(tmp_path).path / "model.safetensors")

    def moved(after: dict[str, torch.Tensor]) -> float:
        return sum(float((after[name].float() - before[name].float()).norm()) for name in before)

    assert moved(weights[0]) > 1.5 * moved(weights[1]) > 3 * moved(weights[2])
    assert all("grad_norm" in values for _, values in logged if "learning_rate" in values)


def test_noise_on_embeddings_changes_what_is_learned_and_nothing_that_is_looked_at(tmp_path: Path) -> None:
    plain, noisy = (tuned(tmp_path, **more).facts["training"] for more in ({}, {"neftune_noise_alpha": 30.0}))
    assert noisy["loss_first"] != pytest.approx(plain["loss_first"], rel=1e-4)
    base, data = tiny_model(tmp_path), split(tmp_path)
    still = {"steps": 1, "batch_size": 8, "learning_rate": 1e-12, "neftune_noise_alpha": 30.0}
    made = run_stage(tmp_path, "sft", still, inputs={"model": base, "data": [data]})
    quiet = run_stage(tmp_path, "sft", {**still, "neftune_noise_alpha": None}, inputs={"model": base, "data": [data]})
    assert made.facts["training"]["eval_loss"] == pytest.approx(quiet.facts["training"]["eval_loss"], rel=1e-5)


def test_only_the_weights_that_are_named_are_trained(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    made = tuned(tmp_path, train=["model.layers.1.mlp.*", "*layers.0*norm*"], save_dtype="fp32", weight_decay=0.5)
    before, after = (load_file(item.path / "model.safetensors") for item in (base, made))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved == {
        name for name in before if name.startswith("model.layers.1.mlp.") or ("layers.0." in name and "norm" in name)
    }
    assert set(made.facts["training"]["trained"]["tensors"]) == {
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
        "model.layers.*.mlp.down_proj.weight",
        "model.layers.*.input_layernorm.weight",
        "model.layers.*.post_attention_layernorm.weight",
    }
    with pytest.raises(ModelError, match=r"the pattern '\*\.mpl\.\*', which no weight matches"):
        tuned(tmp_path, train=["*.mlp.*", "*.mpl.*"])


def test_the_validation_split_is_looked_at_as_often_as_asked(
    tmp_path: Path, logged: list[tuple[int, dict[str, float]]]
) -> None:
    inputs = {"model": tiny_model(tmp_path), "data": [split(tmp_path)]}
    run_stage(tmp_path, "sft", {**STEPS, "steps": 9, "eval_every": 3}, inputs=inputs)
    assert [step for step, values in logged if "eval_loss" in values] == [3, 6, 9]


def test_the_best_weights_are_stored_and_training_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    # The other rows of the split say something else: training on these soon makes it worse.
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    data = run_stage(tmp_path, "data", {"source": str(source), "split": {"validation": 0.25}})
    config = {
        "steps": 60,
        "batch_size": 6,
        "learning_rate": 3e-2,
        "eval_every": 2,
        "log_every": 1,
        "schedule": "constant",
    }
    inputs = {"model": base, "data": [data]}
    last = run_stage(tmp_path, "sft", config, inputs=inputs).facts["training"]
    best = run_stage(tmp_path, "sft", {**config, "keep_best": True}, inputs=inputs).facts["training"]
    early = run_stage(tmp_path, "sft", {**config, "keep_best": True, "patience": 2}, inputs=inputs).facts["training"]
    assert best["eval_loss"] < last["eval_loss"] - 0.1
    assert best["eval_loss"] == pytest.approx(best["best_eval_loss"], rel=1e-3)
    assert best["best_step"] < 60
    assert early["steps"] == early["best_step"] + 4
    light = run_stage(
        tmp_path,
        "sft",
        {**config, "keep_best": True, "patience": 2, "adapter": {"uses": "lora", "r": 4}},
        inputs=inputs,
    ).facts["training"]
    assert light["eval_loss"] == pytest.approx(light["best_eval_loss"], rel=1e-3)


def test_bf16_is_taken_where_it_pays_and_a_stage_that_goes_on_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned(tmp_path).facts["training"]["precision"] == "fp32"
    monkeypatch.setattr(precision, "SMALL", 1)
    monkeypatch.setattr(precision, "_seconds", lambda dtype, width: 1.0 if dtype == torch.bfloat16 else 2.0)
    made = tuned(tmp_path, adapter={"uses": "lora", "r": 2}, seed=3)
    assert made.facts["training"]["precision"] == "bf16"
    assert made.facts["load_options"] == {"dtype": "bfloat16"}
    # What was found once holds for the whole store, whatever the clock says later.
    monkeypatch.setattr(precision, "_seconds", lambda dtype, width: 1.0)
    assert tuned(tmp_path, seed=4).facts["training"]["precision"] == "bf16"
    assert tuned(tmp_path, precision="fp32").facts["training"]["precision"] == "fp32"


def test_a_receipt_says_what_was_trained(tmp_path: Path) -> None:
    made = tuned(tmp_path, adapter={"uses": "lora", "r": 2})
    facts = made.facts["training"]
    trained = facts["trained"]
    weights = load_file(made.path / "adapter_model.safetensors")
    assert trained["parameters"] == sum(value.numel() for value in weights.values())
    assert sum(trained["tensors"].values()) == len(weights)
    assert 0 < trained["share"] < 0.2
    assert trained["without_gradient"] == []
    assert trained["tokens_per_second"] > 0
    assert trained["peak_memory"] > 10**8
    assert facts["stored"]["norms"]["change"] > 0
    assert facts["reload_difference"] < 1e-3
    shown = facts["first_rows"][0]
    assert [part["trained"] for part in shown] == [False, True]
    assert shown[1]["text"].endswith("<|im_end|>")


def test_what_no_gradient_reaches_is_named_and_refused_where_it_is_all(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    from luthier.modeling.loading import load_model
    from luthier.training.receipt import Receipt

    model = load_model(base)
    with pytest.raises(ModelError, match="no gradient reaches"), Receipt(model, tmp_path).step([]):
        pass
    receipt = Receipt(model, tmp_path)
    with receipt.step([]):
        model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    left = receipt.without_gradient()
    assert "model.layers.0.mlp.up_proj.weight" not in left
    assert "model.layers.1.mlp.up_proj.weight" in left
    receipt.keep()
    assert Receipt(model, tmp_path).without_gradient() == left


def test_what_is_stored_and_loads_as_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.modeling import loading
    from luthier.training import tuning

    def spoiled(model: Any, *args: Any, **named: Any) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1
        return loading.save_adapter(model, *args, **named)

    monkeypatch.setattr(tuning, "save_adapter", spoiled)
    with pytest.raises(ModelError, match="what was stored is not what was trained"):
        tuned(tmp_path, adapter={"uses": "lora", "r": 2})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"micro_batch_size": 9}, "is more than `batch_size` 8"),
        ({"train": ["*"], "adapter": "lora"}, "leave `train` or `adapter` out"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "more than all steps"),
    ],
)
def test_options_that_contradict_each_other_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(Exception, match=told):
        default_registry().use("stage", {"uses": "sft", "model": "m", "data": "d", **STEPS, **config})


@pytest.mark.parametrize("name", ["keep_best", "patience", "eval_every"])
def test_a_validation_split_that_is_asked_for_has_to_be_there(name: str) -> None:
    use = default_registry().use(
        "stage", {"uses": "sft", "model": "m", "data": "d", name: True if name == "keep_best" else 2}
    )
    config: Any = use.config
    facts = {"data": [{"rows": {"train": 8}, "schema": "messages"}]}
    assert any(f"`{name}` asks for a validation split" in text for text in config.early_problems(facts))
    facts = {"data": [{"rows": {"train": 8, "validation": 2}, "schema": "messages"}]}
    assert not config.early_problems(facts)


def test_flash_attention_wants_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match="wants a GPU"):
        tuned(tmp_path, attention="flash")
