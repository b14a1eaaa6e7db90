"""Adapter folders, judged from their JSON files alone. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from luthier.api.artifact import BASE, Artifact
from luthier.api.errors import ModelError
from luthier.artifacts.digest import digest_value
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.texts import chat_template, stop_token_ids, stop_tokens, tokenizer_digest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB = "hf:"
SETS = (
    "target_modules",
    "target_parameters",
    "feedforward_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
)
"""Settings of PEFT whose order means nothing."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT writes it, and no full model beside it."""
    return (folder / ADAPTER_CONFIG).exists() and not any(folder.glob("model*.safetensors"))


def adapter_facts(out: Path, base: str, source: Artifact) -> dict[str, Any]:
    """What an adapter artifact's manifest says of it.

    Args:
        out: Its folder, as PEFT writes it, with the text files.
        base: The key of the model that it sits on.
        source: The model or adapter that it was made from.
    """
    config = read_json(out / ADAPTER_CONFIG)
    template = chat_template(out)
    stops = stop_token_ids(out) or source.facts["stop_token_ids"]
    return {
        "base": base,
        "adapter": "dora" if config.get("use_dora") else str(config["peft_type"]).lower(),
        "r": config.get("r"),
        "architecture": source.facts["architecture"],
        "dtype": source.facts["dtype"],
        "tensors": source.facts["tensors"],
        "tokenizer": tokenizer_digest(out),
        "chat_template": digest_value(template) if template is not None else None,
        "stop_tokens": stop_tokens(out),
        "stop_token_ids": stops,
    }


def write_adapter_config(folder: Path, base: Artifact) -> None:
    """Write an adapter's config the same whenever and wherever it is written: PEFT has sets of names in any order, and
    the folder that the model was loaded from.

    Args:
        folder: The adapter's folder, with the config as PEFT wrote it.
        base: The model that it sits on: named by its hub id, or as the folder beside the weights that an adapter which
            leaves the store brings it in.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    repository, _, revision = str(base.facts.get("source", "")).partition("@")
    on_hub = repository.startswith(HUB)
    for name in SETS:
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    config["base_model_name_or_path"] = repository.removeprefix(HUB) if on_hub else BASE
    config["revision"] = (revision or None) if on_hub else None
    write_json(folder / ADAPTER_CONFIG, config)


def named_base(adapter: Path, folder: Path) -> str:
    """The model that an adapter's config names: an absolute path, or a hub id as ``hf:org/name``.

    Args:
        adapter: The adapter's folder.
        folder: What relative paths start from, besides the adapter's own folder.

    Raises:
        ModelError: it names none, or one that is not here.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    named = str(config.get("base_model_name_or_path") or "")
    if not named:
        raise ModelError("the adapter does not say which model it sits on", where=str(adapter), hint=_way_out(adapter))
    for start in (folder, adapter):
        path = start / Path(named).expanduser()
        if _is_model(path):
            return str(path.absolute())
    if HUB_ID.fullmatch(named):
        revision = config.get("revision")
        return f"hf:{named}@{revision}" if revision else f"hf:{named}"
    raise ModelError(f"the adapter sits on '{named}', which is not here", where=str(adapter), hint=_way_out(adapter))


def _way_out(adapter: Path) -> str:
    return f"name its model yourself: write <model>+{adapter.name}, or a stage {{uses: adapter, source, model}}"


def _is_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").exists()
    except OSError:
        # A path on another machine: it means nothing here.
        return False
