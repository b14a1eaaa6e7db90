"""Which layers and parameters of a model an adapter goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from luthier.api.errors import ModelError


def check_targets(model: Any, wanted: Sequence[str]) -> None:
    """Refuse names of layers that a model does not have, or that no low-rank adapter goes on.

    Args:
        model: The model, without an adapter.
        wanted: Names, or ends of names, of modules.

    Raises:
        ModelError: names each that matches nothing, or the first that is no layer.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _takes_adapter(module)}
    _refuse_unmatched("target_modules", wanted, set(modules), set(layers))
    odd = [
        (name, module)
        for name, module in modules.items()
        if any(_matched(item, {name}) for item in wanted) and not _takes_adapter(module)
    ]
    if odd:
        name, module = odd[0]
        raise ModelError(
            f"`target_modules` names {name}, a {type(module).__name__}, which no low-rank adapter goes on",
            hint="name linear layers: " + ", ".join(sorted({name.rpartition(".")[2] for name in layers})),
        )


def _takes_adapter(module: Any) -> bool:
    plain = (Conv1D, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, plain) or (isinstance(module, torch.nn.Linear) and not _is_router(module))


def _is_router(module: Any) -> bool:
    kind = type(module)
    return isinstance(module, torch.nn.Linear) and kind is not torch.nn.Linear and "transformers." in kind.__module__


def routers(model: Any) -> list[str]:
    """The names of linear layers that an architecture has changed into something else, such as its routers."""
    return [name for name, module in model.named_modules() if _is_router(module)]


def linear_names(model: Any) -> list[str]:
    """The names of all linear layers that take an adapter, without the output head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and not _is_router(module) and module is not head
    ]


def last_names(model: Any) -> list[str]:
    """What the layers of `linear_names` are called in their blocks."""
    return sorted({name.rpartition(".")[2] for name in linear_names(model)})


def fused_parameters(model: Any) -> list[str]:
    """The names of weights that are experts of a layer in one parameter, and so no linear layers; none for
    architectures whose experts PEFT finds by itself."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked: Any = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    convert_peft_config_for_transformers(asked, model, None)
    if asked.target_parameters:
        return []
    convolutions = [name for name, module in model.named_modules() if "Conv" in type(module).__name__]
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not _inside_any(name, dict.fromkeys(convolutions))
    ]


def taken_for_experts(model: Any, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Linear layers that an adapter is wanted on, and that PEFT would pass by.

    In some architectures it reads the names of gated layers as those of experts alone, as they were called in older
    versions of transformers; dense blocks and shared experts, which still have such layers, would get nothing.

    Args:
        model: The model, without an adapter.
        wanted: Names, or ends of names, of modules.

    Returns:
        The names of their weights, and what is left of `wanted` for PEFT to read: all of it where it names
        experts whole, and there are some.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = last_names(model)
    asked = LoraConfig(target_modules=list(names), task_type="CAUSAL_LM")
    try:
        convert_peft_config_for_transformers(asked, model, None)
    # It wants all parts of what is fused, and this model has not all of them as linear layers.
    except ValueError:
        return [], list(wanted)
    taken = set(names) - set(asked.target_modules or [])
    lost = [
        name
        for name in linear_names(model)
        if name.rpartition(".")[2] in taken and any(_matched(item, {name}) for item in wanted)
    ]
    whole = has_experts(model) and taken <= {item.rpartition(".")[2] for item in wanted}
    rest = list(wanted) if whole else [item for item in wanted if item.rpartition(".")[2] not in taken]
    return [f"{name}.weight" for name in lost], rest


def has_experts(model: Any) -> bool:
    """Whether some layers have experts."""
    return any(".experts." in name for name, _ in model.named_parameters())


def ends_of(names: Sequence[str], blocks: Sequence[int] | None) -> list[str]:
    """Parameters as an adapter's config names them: the ends of their names, or in full where some blocks are meant."""
    if blocks is None:
        return sorted(
            {".".join(name.split(".")[-3:] if name.endswith(".weight") else name.split(".")[-2:]) for name in names}
        )
    return [name for name in names if any(part.isdigit() and int(part) in blocks for part in name.split("."))]


def _refuse_unmatched(field: str, wanted: Iterable[str], names: set[str], known: set[str]) -> None:
    unmatched = sorted(item for item in wanted if not _matched(item, names))
    if unmatched:
        last = sorted({name.rpartition(".")[2] for name in names})
        close = [near[0] for item in unmatched if (near := get_close_matches(item, last, 1))]
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
        raise ModelError(
            f"`{field}` names what the model does not have: {', '.join(unmatched)}",
            hint=f"did you mean {', '.join(dict.fromkeys(close))}?" if close else f"its layers are called {layers}",
        )


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
        excluded = {name for name in names if _matched_by(getattr(config, "exclude_modules", None), name)}
        places = {
            "target_modules": adapted | excluded,
            "modules_to_save": kept,
            "target_parameters": parameters,
            "exclude_modules": names,
            "trainable_token_indices": kept,
        }
        for field, known in places.items():
            # Each kind of adapter has some of them.
            wanted = getattr(config, field, None)
            if wanted is None or isinstance(wanted, str) or (isinstance(wanted, (list, tuple)) and not wanted):
                continue
            if field == "trainable_token_indices" and not isinstance(wanted, dict):
                continue
            _refuse_unmatched(field, [str(item) for item in wanted], known, adapted)


def _plain(name: str) -> str:
    """A module's or parameter's name in the model, without what PEFT puts around it."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+|token_adapter)\b", "", name)


def _matched_by(selectors: Any, name: str) -> bool:
    return isinstance(selectors, (list, set, tuple)) and any(_matched(str(item), {name}) for item in selectors)


def _matched(wanted: str, known: set[str]) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for name in known)


def without_adapter(model: Any) -> str | None:
    """What a fresh adapter on all linear layers leaves out, in words: experts that are one parameter together, and so
    no linear layers, and what PEFT passes by; None where nothing is.

    Args:
        model: The model with its adapter.
    """
    inside = model.get_base_model()
    head = inside.get_output_embeddings()
    adapted = {name: module for name, module in inside.named_modules() if isinstance(module, BaseTunerLayer)}
    left = {
        name: module.weight.numel()
        for name, module in inside.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and not _inside_any(name, adapted)
    }
    convolutions = [name for name, module in inside.named_modules() if "Conv" in type(module).__name__]
    left |= {
        name: parameter.numel()
        for name, parameter in inside.named_parameters()
        if parameter.ndim >= 3
        and not parameter.requires_grad
        and not _inside_any(name, {**adapted, **dict.fromkeys(convolutions)})
    }
    if not left:
        return None
    reached = sum(
        parameter.numel()
        for name, parameter in inside.named_parameters()
        if parameter.ndim >= 2 and not parameter.requires_grad and _inside_any(name, adapted)
    )
    share = sum(left.values()) / (sum(left.values()) + reached)
    kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in left})
    return (
        f"{share:.0%} of the weights in the model's layers get no adapter and stay as they are; experts that are "
        f"parameters of their own are no linear layers ({', '.join(kinds)})"
    )


def _inside_any(name: str, modules: Mapping[str, Any]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in modules)
