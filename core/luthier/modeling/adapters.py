"""Puts adapters on their models without the models' weights, to see whether they belong there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from luthier.api.errors import LuthierError, ModelError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.artifacts.tensors import safetensors_header

SHOWN = 3
MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\) from checkpoint.*?Size\((\[.*?\])\)")


def check_adapter(folder: Path, base: Path) -> list[str]:
    """Let PEFT put an adapter on a model on the meta device: every tensor has to find its place.

    PEFT itself only warns of what is missing or left over, and then computes with a part of the adapter.

    Args:
        folder: The adapter, as PEFT writes it.
        base: The model's folder.

    Returns:
        The modules that the adapter's config names and for which it brings nothing: they stay as they are.

    Raises:
        ModelError: names what does not fit.
    """
    import peft

    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ModelError(
                f"a {config.peft_type.value} adapter changes prompts and no weights",
                where=str(folder),
                hint="use a LoRA adapter",
            )
        written = set(safetensors_header(folder / ADAPTER_WEIGHTS))
        model: Any = peft.PeftModel(_without_weights(base), config, low_cpu_mem_usage=True)
        with warnings.catch_warnings():
            # What it warns of is an error or an answer here.
            warnings.simplefilter("ignore")
            found: Any = model.load_adapter(str(folder), "default", low_cpu_mem_usage=True, torch_device="cpu")
    except LuthierError:
        raise
    # PEFT and transformers may raise anything when names, shapes or settings differ.
    except Exception as error:
        wrong = [f"{name} is {here} there, and {made} in the adapter" for name, made, here in _mismatches(error)]
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _mismatch(folder, wrong or [first]) from error
    wrong = [f"the model has no place for {name}" for name in sorted(found.unexpected_keys)]
    missing = sorted(name.replace(".default", "") for name in found.missing_keys)
    modules = {name.rpartition(".lora_")[0] for name in missing}
    # What is missing begins as no update, unless the config says otherwise.
    at_random = getattr(config, "init_lora_weights", True) is not True
    halves = {module for module in modules if at_random or any(name.startswith(f"{module}.lora_") for name in written)}
    wrong += [f"the adapter has no {name}" for name in missing if name.rpartition(".lora_")[0] in {"", *halves}]
    if wrong:
        raise _mismatch(folder, wrong)
    return sorted(modules)


def _without_weights(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def check_finite_adapter(folder: Path) -> None:
    """Refuse an adapter whose weights are no numbers.

    Raises:
        ModelError: names the first tensor.
    """
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the adapter has NaN or infinite values in {name}", where=str(folder))


def linear_modules(folder: Path) -> list[str]:
    """The names of a model's linear layers, those of GPT-2 among them, found without reading a weight.

    Args:
        folder: The model's folder.
    """
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in _without_weights(folder).named_modules() if isinstance(module, kinds)]


def _mismatches(error: Exception) -> list[tuple[str, str, str]]:
    return [(name.replace(".default", ""), made, here) for name, made, here in MISMATCH.findall(str(error))]


def _mismatch(folder: Path, wrong: list[str]) -> ModelError:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return ModelError(f"the adapter does not belong on this model: {'; '.join(wrong[:SHOWN])}{more}", where=str(folder))
