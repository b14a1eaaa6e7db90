"""Every adapter, with every option: trained, stored, loaded again, folded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_models import architecture, make_model
from luthier.api import Artifact, ModelError
from luthier.merging import folding
from luthier.merging.folding import full_weights
from luthier.modeling.loading import load_model
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!" * (n + 1)}]}
    for n in range(8)
]
IDS = torch.arange(3, 40)[None]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"uses": "lora", "r": 4},
    "rslora": {"uses": "lora", "r": 4, "rslora": True},
    "gaussian": {"uses": "lora", "r": 4, "init": "gaussian"},
    "pissa": {"uses": "lora", "r": 4, "init": "pissa"},
    "pissa-rslora": {"uses": "lora", "r": 4, "init": "pissa", "rslora": True},
    "lora+": {"uses": "lora", "r": 4, "lora_plus_ratio": 8.0},
    "bias": {"uses": "lora", "r": 4, "bias": "all"},
    "layers": {"uses": "lora", "r": 4, "layers": [1]},
    "head": {"uses": "lora", "r": 4, "target_modules": ["q_proj", "lm_head"]},
    "saved-head": {"uses": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "tokens": {"uses": "lora", "r": 4, "tokens": ["<|im_end|>", "<|im_start|>"]},
    "dora": {"uses": "dora", "r": 4},
    "qlora": {"uses": "qlora", "r": 4},
    "loftq": {"uses": "qlora", "r": 4, "init": "loftq"},
    "fp4": {"uses": "qlora", "r": 4, "quant_type": "fp4"},
    "vera": {"uses": "vera", "r": 32},
    "ia3": {"uses": "ia3"},
    "oft": {"uses": "oft", "block_size": 16},
    "loha": {"uses": "peft", "type": "LOHA", "options": {"r": 4, "target_modules": ["q_proj", "down_proj"]}},
}


def tuned(folder: Path, adapter: dict[str, Any], model: Artifact, **config: Any) -> Artifact:
    settings = {"steps": 8, "batch_size": 8, "learning_rate": 2e-2, "log_every": 1, "adapter": adapter, **config}
    return run_stage(folder, "sft", settings, inputs={"model": model, "data": [tiny_dataset(folder, CHATS)]})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_learns_and_is_folded_into_what_it_was(tmp_path: Path, name: str) -> None:
    base = tiny_model(tmp_path, tied=False)
    made = tuned(tmp_path, ADAPTERS[name], base)
    facts = made.facts["training"]
    assert facts["loss_last"] < facts["loss_first"] - 0.02
    assert made.kind == "adapter"
    beside = logits(load_model(made))
    assert not torch.allclose(beside, logits(load_model(base)), atol=1e-3)
    folded = AutoModelForCausalLM.from_pretrained(full_weights(made, tmp_path / "folded"))
    torch.testing.assert_close(logits(folded), beside, rtol=1e-3, atol=2e-3)
    # Trained further, it begins where it was.
    again = run_stage(
        tmp_path,
        "sft",
        {"steps": 1, "batch_size": 8, "learning_rate": 1e-9, "log_every": 1},
        inputs={"model": made, "data": [tiny_dataset(tmp_path, CHATS)]},
    )
    assert again.facts["training"]["loss_first"] < facts["loss_first"]


def keys(artifact: Artifact) -> set[str]:
    return set(load_file(artifact.path / "adapter_model.safetensors"))


def test_options_do_what_they_say(tmp_path: Path) -> None:
    base = tiny_model(tmp_path, tied=False)
    made = {name: tuned(tmp_path, ADAPTERS[name], base, steps=2) for name in ADAPTERS if not name.startswith("qlora")}
    assert all("layers.1." in key for key in keys(made["layers"]))
    assert any("lm_head" in key for key in keys(made["head"]))
    assert not any("lm_head" in key for key in keys(made["lora"]))
    assert "base_model.model.lm_head.weight" in keys(made["saved-head"])
    assert any("embed_tokens" in key for key in keys(made["tokens"]))
    configs = {name: json.loads((item.path / "adapter_config.json").read_text()) for name, item in made.items()}
    assert configs["rslora"]["use_rslora"]
    assert configs["pissa"]["r"] == 8
    assert configs["pissa"]["init_lora_weights"] is not False
    assert configs["vera"]["peft_type"] == "VERA"
    # PEFT keeps names as sets: what is stored has them in one order.
    for config in configs.values():
        for name, value in config.items():
            if isinstance(value, list) and name != "trainable_token_indices":
                assert value == sorted(value), name
    first = {name: item.facts["training"]["loss_first"] for name, item in made.items()}
    # None changes what the model says before it is trained, but for what quantizing does.
    for name in set(made) - {"loftq", "fp4"}:
        assert first[name] == pytest.approx(first["lora"], rel=1e-4), name
    updates = {name: load_file(made[name].path / "adapter_model.safetensors") for name in ("lora", "lora+")}

    def size(name: str, half: str) -> float:
        return sum(float(value.norm()) for key, value in updates[name].items() if half in key)

    assert size("lora+", "lora_B") > 4 * size("lora", "lora_B")


def test_loftq_is_nearer_to_the_model_than_its_quantized_weights(tmp_path: Path) -> None:
    base = tiny_model(tmp_path, hidden_size=128, tied=False)
    right = logits(load_model(base))
    still = {"steps": 1, "learning_rate": 1e-12}
    distances = [
        float((logits(load_model(tuned(tmp_path, adapter, base, **still), trainable=True)) - right).abs().mean())
        for adapter in ({"uses": "qlora", "r": 16}, {"uses": "qlora", "r": 16, "init": "loftq"})
    ]
    assert distances[1] < 0.9 * distances[0]


def test_eight_bits_are_eight_bits(tmp_path: Path) -> None:
    from luthier.modeling.loading import load_model as load

    base = tiny_model(tmp_path, tied=False)
    made = tuned(tmp_path, {"uses": "qlora", "r": 4, "bits": 8}, base)
    assert made.facts["load_options"] == {"quantization": {"load_in_8bit": True}}
    kinds = {type(module).__name__ for module in load(made, trainable=True).modules()}
    assert "Linear8bitLt" in kinds
    assert made.facts["training"]["loss_last"] < made.facts["training"]["loss_first"]


def test_fused_experts_get_an_adapter_and_are_folded(tmp_path: Path) -> None:
    for name, values in (("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}), ("mixtral", None)):
        folder = tmp_path / name
        source = make_model(folder, "mixtral") if values is None else architecture(folder, name, **values)
        base = run_stage(tmp_path / "s", "base", {"source": str(source)})
        made = tuned(tmp_path / "s", {"uses": "lora", "r": 2}, base)
        assert any("experts" in key for key in keys(made)), name
        assert not [text for text in made.manifest["warnings"] if "experts" in text]
        beside = logits(load_model(made))
        whole = AutoModelForCausalLM.from_pretrained(full_weights(made, tmp_path / f"{name}-folded"))
        torch.testing.assert_close(logits(whole), beside, rtol=1e-3, atol=2e-3)
        before, after = (dict(model.named_parameters()) for model in (load_model(base), whole))
        moved = [key for key in before if "experts" in key and not torch.equal(before[key], after[key])]
        assert moved


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"uses": "lora", "init": "loftq"}, "makes up for what quantizing the base took away"),
        ({"uses": "lora", "tokens": ["<|nobody|>"]}, "has no token '<|nobody|>'"),
        ({"uses": "lora", "layers": [77]}, "77"),
        ({"uses": "vera", "target_modules": ["q_prj"]}, "does not have: q_prj"),
        ({"uses": "ia3", "layers": [0]}, "IA3 has no `layers`"),
        ({"uses": "peft", "type": "LOHAA"}, "did you mean LOHA"),
        ({"uses": "peft", "type": "LOHA", "options": {"rr": 3}}, "has no field 'rr'"),
        ({"uses": "peft", "type": "PREFIX_TUNING", "options": {"num_virtual_tokens": 3}}, "changes prompts"),
        ({"uses": "lora", "target_parameters": ["experts.nothing"]}, "experts.nothing"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path, adapter: dict[str, Any], told: str) -> None:
    base = tiny_model(tmp_path)
    with pytest.raises(ModelError) as caught:
        tuned(tmp_path, adapter, base)
    assert told in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "adapter",
    [
        {"uses": "qlora", "init": "pissa"},
        {"uses": "qlora", "init": "loftq", "bits": 8},
        {"uses": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]},
    ],
)
def test_options_that_contradict_each_other_are_refused_while_planning(adapter: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ValueError, Exception), match=r"pissa|4 bits|feedforward_modules"):
        default_registry().use("adapter", adapter)


@pytest.mark.parametrize(
    ("adapter", "modules"),
    [
        ({"target_modules": ["gate_proj"]}, {"0.mlp.gate_proj", "1.mlp.shared_experts.gate_proj"}),
        (
            {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
            {
                *(f"0.mlp.{part}_proj" for part in ("gate", "up", "down")),
                *(f"1.mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")),
                "1.mlp.experts",
            },
        ),
        (
            {"target_modules": ["shared_experts.up_proj", "o_proj"]},
            {"1.mlp.shared_experts.up_proj", "0.self_attn.o_proj", "1.self_attn.o_proj"},
        ),
    ],
)
def test_dense_layers_that_are_called_as_experts_were_get_their_adapter(
    tmp_path: Path, adapter: dict[str, Any], modules: set[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    base = run_stage(tmp_path, "base", {"source": str(make_model(tmp_path / "model", "deepseek-v2", **sizes))})
    made = tuned(tmp_path, {"uses": "lora", "r": 2, **adapter}, base, steps=1)
    found = {key.partition(".lora_")[0].removesuffix(".base_layer").partition(".layers.")[2] for key in keys(made)}
    assert found == modules
    # What PEFT reads back is what it wrote.
    assert set(dict(load_model(made).named_modules())) >= {f"base_model.model.model.layers.{name}" for name in modules}
    with pytest.raises(ModelError, match="PEFT has no such adapter for"):
        tuned(tmp_path, {"uses": "dora", "r": 2, **adapter}, base, steps=1)


def test_blocks_are_chosen_among_experts_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    base = run_stage(tmp_path, "base", {"source": str(make_model(tmp_path / "model", "qwen2-moe", **sizes))})
    made = tuned(tmp_path, {"uses": "lora", "r": 2, "layers": [1]}, base, steps=1)
    assert any("experts" in key for key in keys(made))
    assert all(".layers.1." in key for key in keys(made))


def test_a_low_rank_adapter_is_folded_without_loading_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path, tied=False)
    made = tuned(tmp_path, {"uses": "dora", "r": 4}, base)
    beside = logits(load_model(made))
    monkeypatch.setattr(folding, "SHARD", 20_000)
    monkeypatch.setattr(folding.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(folding, "folded_by_peft", lambda *_: pytest.fail("PEFT folds it"))
    monkeypatch.setattr(folding, "check_folded", lambda *_: pytest.fail("there is no room for it"))
    folder = full_weights(made, tmp_path / "folded")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert {path.name for path in base.path.iterdir() if path.suffix != ".safetensors"} - {"manifest.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), beside, rtol=1e-4, atol=1e-4)


def test_what_is_folded_wrongly_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tuned(tmp_path, {"uses": "lora", "r": 4}, tiny_model(tmp_path, tied=False))
    monkeypatch.setattr("luthier.merging.lowrank.LowRank._scale", lambda *_: 0.5)
    with pytest.raises(ModelError, match="folded into its model, the adapter behaves differently"):
        full_weights(made, tmp_path / "folded")
