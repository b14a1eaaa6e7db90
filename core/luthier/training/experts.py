"""Mixtures of experts: how tokens are shared out among experts, and training some of them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.api.tuning import ExpertChoice
from luthier.artifacts.json_files import read_json, write_json
from luthier.training.batches import evaluating
from luthier.training.encoding import EncodedRow

ROUTERS = ("gate", "router")
"""What architectures call the layer that sends tokens to experts."""
COUNTED = 16
"""Rows whose tokens are counted for the receipt."""
CHOSEN = "experts.json"
TRAINED_ROWS = "trained_rows"
"""The attribute of a parameter of which only some rows, the experts, are trained: their numbers."""


@dataclass(slots=True)
class Load:
    """What the experts of one layer were given.

    Attributes:
        tokens: How many tokens came to each, shape (experts,).
        weights: What these weigh in the layer's result, added up, of the same shape.
    """

    tokens: Tensor
    weights: Tensor

    def shares(self, by: str = "tokens") -> Tensor:
        """Each expert's share, shape (experts,)."""
        values = self.tokens if by == "tokens" else self.weights
        return values / values.sum().clamp(min=1e-9)


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the experts of a layer in parameters of three dimensions, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and any(item.ndim == 3 for item in module.parameters(recurse=False))
    }


def router_weights(model: nn.Module) -> list[str]:
    """The names of the weights that decide where tokens go."""
    modules = dict(model.named_modules())
    parents = [name.rpartition(".")[0] for name in expert_layers(model)]
    routers = [f"{parent}.{child}" for parent in parents for child in ROUTERS if f"{parent}.{child}" in modules]
    return [f"{name}.{part}" for name in routers for part, _ in modules[name].named_parameters()]


def load_of(model: Any, rows: Sequence[EncodedRow]) -> dict[str, Load]:
    """How tokens of rows are shared out, layer by layer; nothing where a model does not tell its experts.

    Args:
        model: The model, with an adapter or without.
        rows: The rows; each is computed by itself, so that there is no padding.
    """
    loads: dict[str, Load] = {}
    layers = expert_layers(model)
    device = next(model.parameters()).device

    def count(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        tensors = [item for item in arguments if isinstance(item, Tensor)]
        chosen = next((item for item in tensors if not item.is_floating_point() and item.dtype != torch.bool), None)
        weights = next((item for item in tensors[1:] if item.is_floating_point()), None)
        if chosen is None or weights is None or chosen.shape != weights.shape:
            return
        size = max(len(item) for item in module.parameters(recurse=False) if item.ndim == 3)
        load = loads.setdefault(name, Load(torch.zeros(size), torch.zeros(size)))
        places = chosen.flatten().cpu()
        load.tokens += torch.bincount(places, minlength=size)[:size]
        load.weights.index_add_(0, places, weights.flatten().float().cpu())

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(partial(count, name)).remove)
        for row in rows if layers else ():
            for item in row.completions:
                model(input_ids=torch.tensor([item.input_ids], device=device), use_cache=False)
    return loads


def shares_of(loads: Mapping[str, Load]) -> dict[str, list[float]]:
    """What a manifest says of loads."""
    return {name: [round(value, 4) for value in load.shares().tolist()] for name, load in loads.items()}


def choose_experts(model: Any, choice: ExpertChoice, rows: Sequence[EncodedRow], context: StageContext) -> None:
    """Train some experts of each layer; other weights stay as they are, frozen or not.

    Args:
        model: The model.
        choice: Which.
        rows: The training rows, on which experts are counted where the most used are asked for.
        context: Is told; a stage that is resumed trains the same ones.

    Raises:
        ModelError: the model has no such experts.
    """
    layers = expert_layers(model)
    if not layers:
        raise ModelError("`experts` chooses experts of a mixture, and this model has none", hint="leave it out")
    noted = context.scratch / CHOSEN
    if noted.exists():
        chosen: dict[str, list[int]] = read_json(noted)
    else:
        chosen = _named(layers, choice) if choice.named is not None else _most_used(model, choice, rows)
        write_json(noted, chosen)
    for name, numbers in chosen.items():
        for parameter in layers[name].parameters(recurse=False):
            train_rows(parameter, numbers)
    total = sum(_count(layers[name]) for name in layers)
    context.log(f"{sum(map(len, chosen.values()))} of {total} experts are trained")


def _count(layer: nn.Module) -> int:
    return max(len(item) for item in layer.parameters(recurse=False) if item.ndim == 3)


def _named(layers: Mapping[str, nn.Module], choice: ExpertChoice) -> dict[str, list[int]]:
    named = choice.named
    assert named is not None
    by_block = {_block(name): name for name in layers}
    wanted = named if isinstance(named, dict) else dict.fromkeys(by_block, named)
    odd = sorted(set(wanted) - set(by_block))
    if odd:
        raise ModelError(
            f"`experts` names block {odd[0]}, which has none", hint=f"blocks with experts: {sorted(by_block)}"
        )
    for block, numbers in wanted.items():
        beyond = [number for number in numbers if number >= _count(layers[by_block[block]])]
        if beyond:
            raise ModelError(
                f"`experts` names expert {beyond[0]} of block {block}, which has {_count(layers[by_block[block]])}"
            )
    return {by_block[block]: sorted(set(numbers)) for block, numbers in wanted.items()}


def _block(name: str) -> int:
    """The number of the block that a module is in."""
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())


def _most_used(model: Any, choice: ExpertChoice, rows: Sequence[EncodedRow]) -> dict[str, list[int]]:
    """Of each layer the fewest experts that together take the share that is asked for (Wang et al. 2024,
    arXiv:2407.01906, equation 8; by tokens equation 7, by weights equation 6)."""
    found: dict[str, list[int]] = {}
    for name, load in load_of(model, [rows[place] for place in range(min(choice.rows, len(rows)))]).items():
        shares, order = load.shares(choice.by).sort(descending=True, stable=True)
        assert choice.share is not None, "checked when the config was read"
        # Rounding may leave the sum of all below 1.
        enough = int((shares.cumsum(0) < choice.share - 1e-6).sum()) + 1
        found[name] = sorted(order[:enough].tolist())
    if not found:
        raise ModelError(
            "this model does not tell which experts tokens go to", hint="name them: `experts: {named: [0, 3]}`"
        )
    return found


def train_rows(parameter: nn.Parameter, rows: Sequence[int]) -> None:
    """Let some rows of a parameter be trained alone: gradients of the others are zero, and see `decay_rows`."""
    others = torch.ones(len(parameter), dtype=torch.bool)
    others[list(rows)] = False

    def leave(value: Tensor) -> None:
        if value.grad is not None:
            value.grad[others.to(value.device)] = 0

    parameter.requires_grad_(True)
    setattr(parameter, TRAINED_ROWS, torch.tensor(list(rows)))
    parameter.register_post_accumulate_grad_hook(leave)


def rows_of(parameter: Tensor) -> Tensor | None:
    """The numbers of the rows that are trained, where not all are."""
    return getattr(parameter, TRAINED_ROWS, None)


def partly_trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of which some rows are trained."""
    yield from (item for item in model.parameters() if rows_of(item) is not None)


def decay_rows(model: nn.Module, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Before each step, let weights of trained rows decay, as optimizers do with whole parameters: those of others
    would decay as well, without any gradient.

    Args:
        model: The model.
        optimizer: Its optimizer, in which these parameters have no decay.
        weight_decay: The stage's.
    """
    some = {id(item) for item in partly_trained(model)}
    if not some or not weight_decay:
        return

    def decay(stepping: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
        with torch.no_grad():
            for group in stepping.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in some and parameter.grad is not None:
                        rows = rows_of(parameter)
                        assert rows is not None
                        parameter[rows.to(parameter.device)] *= 1 - group["lr"] * weight_decay

    optimizer.register_step_pre_hook(decay)
