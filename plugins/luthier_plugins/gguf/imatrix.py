"""How much each input channel of a weight matters: what ggml minimises the rounding error by.

For a matrix W and its inputs x, the error of the output is weighted by the mean of x^2 in each column, as llama.cpp's
``llama-imatrix`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from luthier.modeling.streamed import Streamed
from luthier_plugins.gguf.architectures import Planned
from torch import Tensor, nn

LAYER = re.compile(r"\.layers\.(\d+)\.")


class Collector:
    """Sums of squared inputs by the name of the weight, or by the name in GGUF for stacked experts."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor) -> None:
        """Take inputs of a matrix, shape (..., columns)."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._put(name, flat.square().sum(dim=0).cpu(), torch.tensor(flat.shape[0]))

    def add_expert(self, name: str, expert: int, experts: int, inputs: Tensor) -> None:
        """Take inputs of one expert's matrix, shape (tokens, columns)."""
        sums = torch.zeros(experts, inputs.shape[-1])
        counts = torch.zeros(experts, dtype=torch.int64)
        sums[expert] = inputs.detach().float().square().sum(dim=0).cpu()
        counts[expert] = inputs.shape[0]
        self._put(name, sums, counts)

    def _put(self, name: str, sums: Tensor, counts: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += sums
            self._counts[name] += counts
        else:
            self._sums[name], self._counts[name] = sums, counts

    def means(self) -> dict[str, np.ndarray]:
        """The mean squares; 1 for an expert that no token came to."""
        found: dict[str, np.ndarray] = {}
        for name, sums in self._sums.items():
            counts = self._counts[name]
            if sums.dim() == 2:
                means = sums / counts.clamp(min=1)[:, None]
                means[counts == 0] = 1.0
            else:
                means = sums / counts
            found[name] = means.numpy()
        return found

    def idle(self) -> int:
        """How many experts no token came to, in any of their matrices."""
        return max((int((counts == 0).sum()) for counts in self._counts.values() if counts.dim()), default=0)


@contextmanager
def watching(model: nn.Module, collector: Collector) -> Iterator[None]:
    """Take the inputs of all linear layers and experts while it lasts."""
    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_linear(f"{name}.weight", collector)))
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and name.endswith("experts"):
            found = LAYER.search(name)
            handles.append(module.register_forward_pre_hook(_experts(int(found[1]) if found else 0, collector)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(name: str, collector: Collector) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        collector.add(name, inputs[0])

    return hook


def _experts(layer: int, collector: Collector) -> Callable[..., None]:
    """transformers keeps the experts of a layer in one module: which token goes where is among its inputs."""

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
        count = module.gate_up_proj.shape[0]
        for expert in chosen.unique().tolist():
            tokens = hidden[(chosen == expert).any(dim=-1)]
            gate, up = (tokens @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            for role in ("gate", "up"):
                collector.add_expert(f"blk.{layer}.ffn_{role}_exps.weight", expert, count, tokens)
            inner = module.act_fn(gate) * up
            collector.add_expert(f"blk.{layer}.ffn_down_exps.weight", expert, count, inner)

    return hook


def _passed(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def importances_of(
    model: Streamed,
    parts: Sequence[Planned],
    blocks: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, np.ndarray], int]:
    """The importances of the tensors of a GGUF file, from what the model does with some text.

    Args:
        model: The model in full precision.
        parts: The tensors of the file.
        blocks: Token ids.

    Returns:
        The importances by name in GGUF, and how many experts no token came to.
    """
    collector = Collector()
    given = [torch.tensor([list(block)], device=model.device) for block in blocks]
    with watching(model.model, collector):
        # Not padded: inputs of padding would count.
        through = model.walk([partial(_passed, model.model, ids) for ids in given])
        for place, _ in enumerate(through, 1):
            progress(place, len(blocks))
    means = collector.means()
    found: dict[str, np.ndarray] = {}
    for part in parts:
        given = means.get(part.name)
        if given is None and len(part.sources) == 1:
            given = means.get(part.sources[0])
        if given is not None and given.shape[-1] == part.shape[-1] and bool(np.isfinite(given).all()):
            found[part.name] = given
    return found, collector.idle()
