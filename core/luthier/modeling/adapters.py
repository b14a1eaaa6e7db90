"""Puts adapters on their models without the models' weights, to see whether they belong there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from luthier.api.errors import LuthierError, ModelError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.artifacts.models import safetensors_header

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


def check_selectors(model: Any) -> None:
    """Refuse a fresh adapter whose config names something that the model does not have; PEFT is content with one match.

    Args:
        model: The model with its adapter.

    Raises:
        ModelError: names each selector that matches nothing.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {_plain(name) for name, _ in model.named_modules()}
    adapted = {_plain(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    kept = {_plain(name) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    parameters = {_plain(name) for name, _ in model.named_parameters()}
    for config in model.peft_config.values():
        places = {
            "target_modules": adapted,
            "modules_to_save": kept,
            "target_parameters": parameters,
            "exclude_modules": names,
            "trainable_token_indices": kept,
        }
        for field, known in places.items():
            wanted = getattr(config, field, None)
            if wanted is None or isinstance(wanted, str) or (isinstance(wanted, (list, tuple)) and not wanted):
                continue
            if field == "trainable_token_indices" and not isinstance(wanted, dict):
                continue
            unmatched = sorted(str(item) for item in wanted if not _matched(str(item), known))
            if unmatched:
                last = sorted({name.rpartition(".")[2] for name in names})
                close = [near[0] for item in unmatched if (near := get_close_matches(item, last, 1))]
                raise ModelError(
                    f"`{field}` names what the model does not have: {', '.join(unmatched)}",
                    hint=f"did you mean {', '.join(dict.fromkeys(close))}?"
                    if close
                    else "its layers are called " + ", ".join(sorted({name.rpartition(".")[2] for name in adapted})),
                )


def _plain(name: str) -> str:
    """A module's or parameter's name in the model, without what PEFT puts around it."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+|token_adapter)\b", "", name)


def _matched(wanted: str, known: set[str]) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for name in known)


def without_adapter(model: Any) -> str | None:
    """What a fresh adapter on all linear layers leaves out, in words: experts that are one parameter together, and so
    no linear layers; None where nothing is, or where some linear layers were left out on purpose.

    Args:
        model: The model with its adapter.
    """
    inside = model.get_base_model()
    head = inside.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    adapted = {name: module for name, module in inside.named_modules() if isinstance(module, BaseTunerLayer)}
    left = [
        name
        for name, module in inside.named_modules()
        if isinstance(module, kinds) and module is not head and not _inside_any(name, adapted)
    ]
    fused = {
        name: parameter.numel()
        for name, parameter in inside.named_parameters()
        if parameter.ndim >= 3 and not parameter.requires_grad and not _inside_any(name, adapted)
    }
    if left or not fused or any("conv" in name for name in fused):
        return None
    bases: list[Any] = [cast("Any", module).get_base_layer() for module in adapted.values()]
    linear = sum(base.weight.numel() for base in bases)
    share = sum(fused.values()) / (sum(fused.values()) + linear)
    kinds_of = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in fused})
    return (
        f"{share:.0%} of the weights in the model's layers get no adapter and stay as they are: the experts are "
        f"parameters of their own, not linear layers ({', '.join(kinds_of)})"
    )


def _inside_any(name: str, modules: Mapping[str, Any]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in modules)
