"""Every usual architecture: tuned by LoRA, continued by DPO, folded, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATS, PAIRS
from gguf_models import make_model
from luthier.merging.folding import full_weights
from luthier.modeling.loading import load_model
from luthier.testing import run_stage, tiny_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MODULES: dict[str, tuple[str, set[str], dict[str, Any]]] = {
    "llama": ("llama", ATTENTION | GATED, {}),
    "mistral": ("mistral", ATTENTION | GATED, {}),
    "mistral, short window": ("mistral", ATTENTION | GATED, {"sliding_window": 16}),
    "qwen2": ("qwen2", ATTENTION | GATED, {}),
    "qwen3": ("qwen3", ATTENTION | GATED, {}),
    "qwen2-moe": ("qwen2-moe", ATTENTION | GATED | {"experts", "shared_expert_gate"}, {}),
    "qwen3-moe": ("qwen3-moe", ATTENTION | {"experts", "gate"}, {}),
    "deepseek, dense": ("deepseek-v2", LATENT | GATED, {"first_k_dense_replace": 2}),
    "deepseek, experts": ("deepseek-v2", LATENT | GATED | {"experts", "gate"}, {}),
    "gemma2": ("gemma2", ATTENTION | GATED, {}),
    "gemma3": ("gemma3", ATTENTION | GATED, {}),
    "phi3": ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, {}),
    "mixtral": ("mixtral", ATTENTION | {"experts", "gate"}, {}),
}
"""The layers that a LoRA adapter goes on, by what they are called in their blocks."""
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
STEPS = {"steps": 3, "batch_size": 8, "log_every": 1, "precision": "fp32"}


def adapted(keys: set[str]) -> set[str]:
    modules = {key.partition(".lora_")[0] for key in keys}
    # A second one on the same layer is called after the first.
    return {module.removesuffix(".base_layer").rpartition(".")[2] for module in modules}


@pytest.mark.parametrize("name", MODULES)
def test_tuned_preferred_folded_and_loaded_again(tmp_path: Path, name: str) -> None:
    family, modules, values = MODULES[name]
    base = run_stage(tmp_path, "base", {"source": str(make_model(tmp_path / "model", family, **{**SIZES, **values}))})
    chats, pairs = tiny_dataset(tmp_path, CHATS), tiny_dataset(tmp_path, PAIRS)
    config = {**STEPS, "learning_rate": 5e-3, "adapter": {"uses": "lora", "r": 4}}
    light = run_stage(tmp_path, "sft", config, inputs={"model": base, "data": [chats]})
    weights = load_file(light.path / "adapter_model.safetensors")
    assert adapted(set(weights)) == modules
    trained = light.facts["training"]
    assert trained["loss_last"] < trained["loss_first"]
    assert trained["trained"]["without_gradient"] == []
    assert not [text for text in light.manifest["warnings"] if "differ" in text or "no adapter" in text]
    better = run_stage(tmp_path, "dpo", {**STEPS, "learning_rate": 1e-3}, inputs={"model": light, "data": [pairs]})
    assert better.facts["training"]["loss_first"] == pytest.approx(0.6931472, abs=1e-5)
    assert better.facts["training"]["loss_last"] < 0.693
    continued = load_file(better.path / "adapter_model.safetensors")
    assert continued.keys() == weights.keys()
    assert all(not torch.equal(continued[key], weights[key]) for key in weights)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        beside = load_model(better).eval()(input_ids=ids).logits
        folded = AutoModelForCausalLM.from_pretrained(full_weights(better, tmp_path / "folded")).eval()
        before = load_model(base).eval()(input_ids=ids).logits
        torch.testing.assert_close(folded(input_ids=ids).logits, beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, beside, atol=1e-3)
