"""Small models of every architecture that the GGUF exporter knows, with weights large enough to matter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROWS = 320
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * place for place in range(32)],
    "long_factor": [1.0 + 0.1 * place for place in range(32)],
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LATENT_YARN = {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
"""As in DeepSeek's own models, for which attention is sharper the more the context is stretched."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 256}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2-moe-tied": (
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 256,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma2": ("Gemma2Config", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 7, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
    ),
    "phi3": ("Phi3Config", {}),
    "phi3-long": (
        "Phi3Config",
        {"rope_parameters": LONG, "original_max_position_embeddings": 512, "max_position_embeddings": 1024},
    ),
    "deepseek-v2": ("DeepseekV2Config", {**LATENT, "q_lora_rank": 256}),
    "deepseek-v2-lite": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "num_hidden_layers": 27}),
    "llama-yarn-factor": ("LlamaConfig", {"head_dim": 32, "rope_parameters": {**YARN, "attention_factor": 1.0}}),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {"head_dim": 32, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "deepseek-v2-yarn": (
        "DeepseekV2Config",
        {**LATENT, "q_lora_rank": 256, "rope_parameters": {**LATENT_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek-v3-yarn": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 256, "n_group": 2, "topk_group": 1, "rope_parameters": LATENT_YARN},
    ),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, "q_lora_rank": 256, "n_group": 2, "topk_group": 1}),
}


def make_model(folder: Path, name: str, **more: Any) -> Path:
    """Write a model with random weights and the tokenizer of the model that comes with Luthier's tests.

    Args:
        more: Settings of its config.
    """
    from luthier.testing import tiny_model

    torch.manual_seed(0)
    config_class, values = MODELS[name]
    config = getattr(transformers, config_class)(**{**SIZES, **values, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Attention and norms that say little would hide a mistake in them.
            if parameter.dim() > 1 and "embed" not in key:
                parameter.mul_(3)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer = tiny_model(folder.parent / f"{folder.name}-tokenizer")
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / text).write_text((tokenizer.path / text).read_text())
    return folder


def make_gpt2(folder: Path, *, short: bool = False) -> Path:
    """Write a GPT-2 in bfloat16, whose linear layers keep their weights as (in, out).

    Args:
        folder: Where to.
        short: Leave out the name of the model inside the model, as its first files did.
    """
    from luthier.testing import tiny_model

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    if short:
        tensors = load_file(folder / "model.safetensors")
        named = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tiny_model(folder.parent / "t").path / text, folder / text)
    return folder


def architecture(folder: Path, name: str, **values: Any) -> Path:
    """A random model of an architecture with the tokenizer of the tiny one."""
    tokenizer = make_model(folder.parent / "tokenizer", "llama")
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **heads, **values})).save_pretrained(folder)
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / text).write_text((tokenizer / text).read_text())
    return folder
