"""Text files that transformers 4 and 5 read alike, and the servers that are built on either.

transformers 5 writes all rotary settings into one mapping, which version 4 does not read: a model with another theta
than 10000 would read as one with it, without a word. It also names a tokenizer class that version 4 does not have.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier.api.artifact import Artifact
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.models import carry_licences
from luthier.artifacts.texts import DEFAULT, chat_templates, take_chat_templates

CARRIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
FAST = "PreTrainedTokenizerFast"
NEW_CLASSES = ("TokenizersBackend", "PythonBackend")
"""Names of tokenizer classes that transformers 4 does not know."""


def model_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``config.json`` with what both versions look for.

    Args:
        config: As transformers 4 or 5 wrote it.
        dtype: What the weights are stored as, such as ``bfloat16``.
    """
    found = {**config, "dtype": dtype, "torch_dtype": dtype}
    # Qwen 3's experts were counted under this name.
    if "num_local_experts" in config:
        found.setdefault("num_experts", config["num_local_experts"])
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        found["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if rope and rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if config.get("model_type") == "phi3":
            # Version 4 takes these three and no more.
            found.setdefault("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
            scaling = {"type": scaling["rope_type"], **{key: scaling[key] for key in ("short_factor", "long_factor")}}
        found["rope_scaling"] = scaling
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def lost_in_version_4(config: dict[str, Any]) -> str | None:
    """What transformers 4 computes otherwise, whatever is written; None where there is nothing known."""
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    if config.get("model_type") == "deepseek_v2" and rope.get("rope_type") == "yarn" and rope.get("mscale_all_dim"):
        return "transformers 4 leaves out how DeepSeek V2 scales attention with YaRN: use version 5 or vLLM"
    return None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` with a class that both versions know, and the chat template inside."""
    found = read_json(folder / "tokenizer_config.json")
    if found.get("tokenizer_class", FAST) in NEW_CLASSES:
        found["tokenizer_class"] = FAST
    # transformers 5 calls the list that version 4 knows by another name.
    extra = found.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        found["additional_special_tokens"] = extra
    elif extra:
        found["extra_special_tokens"] = extra
    templates = chat_templates(folder)
    if list(templates) == [DEFAULT]:
        found["chat_template"] = templates[DEFAULT]
    elif templates:
        # As version 4 writes and reads several of them.
        found["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return found


def generation_config(folder: Path, stop_ids: list[int]) -> dict[str, Any]:
    """``generation_config.json`` with all stop tokens."""
    path = folder / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    return {**found, "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids} if stop_ids else found


def write_texts(source: Path, model: Artifact, out: Path) -> None:
    """Write everything but weights and config.

    Args:
        source: The folder of the full model.
        model: The model or adapter, whose stop tokens they are.
        out: Where to.
    """
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    carry_licences(source, out)
    take_chat_templates(source, out)
    write_json(out / "tokenizer_config.json", tokenizer_config(source))
    found = generation_config(source, model.facts["stop_token_ids"])
    if found:
        write_json(out / "generation_config.json", found)
