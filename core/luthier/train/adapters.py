"""Puts adapters on their models without the models' weights, to see whether they belong there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.api.errors import ModelError

SHOWN = 3
MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\) from checkpoint.*?Size\((\[.*?\])\)")


def check_adapter(folder: Path, base: Path) -> None:
    """Let PEFT put an adapter on a model on the meta device: every tensor has to find its place.

    PEFT itself only warns of what is missing or left over, and then computes with a part of the adapter.

    Args:
        folder: The adapter, as PEFT writes it.
        base: The model's folder.

    Raises:
        ModelError: names what does not fit.
    """
    import peft

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    written: dict[str, torch.Tensor] = peft.load_peft_weights(str(folder), device="cpu")
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
        model = peft.PeftModel(model, config, low_cpu_mem_usage=True)
        found: Any = peft.set_peft_model_state_dict(model, written, low_cpu_mem_usage=True)
    # PEFT and transformers raise what they like when names or shapes are others.
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        wrong = [f"{name} is {here} there, and {made} in the adapter" for name, made, here in _mismatches(error)]
        raise _misfit(folder, wrong or [str(error).strip().partition("\n")[0]]) from error
    wrong = [f"the model has no place for {name}" for name in sorted(found.unexpected_keys)]
    wrong += [f"the adapter has no {name}" for name in sorted(found.missing_keys) if ".default" in name]
    if wrong:
        raise _misfit(folder, wrong)


def linear_weights(folder: Path) -> set[str]:
    """The names of the weights of a model's linear layers, found without reading a weight.

    Args:
        folder: The model's folder.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _mismatches(error: Exception) -> list[tuple[str, str, str]]:
    return [(name.replace(".default", ""), made, here) for name, made, here in MISMATCH.findall(str(error))]


def _misfit(folder: Path, wrong: list[str]) -> ModelError:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return ModelError(f"the adapter does not belong on this model: {'; '.join(wrong[:SHOWN])}{more}", where=str(folder))
