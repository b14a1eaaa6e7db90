"""The diagonal of the Fisher information: how much what a model says of data depends on each of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from luthier.api.context import Context
from luthier.training.batches import evaluating, log_probabilities
from luthier.training.encoding import EncodedRow
from luthier.training.layout import Layout
from luthier.training.moves import LowRank, Plain, lora_layers


def fisher_of(
    model: Any, weights: Mapping[str, Plain | LowRank], rows: Sequence[EncodedRow], context: Context
) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of log p(row) by each weight: the empirical Fisher information, row by
    row, since the square of a sum is not the sum of squares.

    Args:
        model: The model.
        weights: Its weights, see `luthier.training.moves.weights_of`; of low-rank adapters those that they add to.
        rows: The rows.
        context: Is told how far it is.

    Returns:
        By name, float32 on the CPU, in the shapes of the weights.

    Raises:
        Interrupted: the user asked to stop.
    """
    sums: dict[str, Tensor] = {}
    layout = Layout(0, packed=False, shared=False)
    device = next(model.parameters()).device
    layers = {f"{name}.weight": layer for name, layer in lora_layers(model) if f"{name}.weight" in weights}
    with evaluating(model):
        for done, row in enumerate(rows, 1):
            model.zero_grad(set_to_none=True)
            with _products(layers) as products:
                outputs = log_probabilities(model, layout.batch([row]).to(device), fused=False)
                outputs.completions.logps.sum().backward()
            gradients = dict(products)
            for name, weight in weights.items():
                if isinstance(weight, Plain) and weight.parameter.grad is not None:
                    gradients[name] = weight.parameter.grad
            for name, gradient in gradients.items():
                square = gradient.float().square()
                sums[name] = square if name not in sums else sums[name].add_(square)
            context.progress(done, len(rows), "rows for the Fisher information")
    model.zero_grad(set_to_none=True)
    return {name: (value / len(rows)).cpu().contiguous() for name, value in sums.items()}


@contextmanager
def _products(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The gradients by weights that are not trained themselves: of a linear layer that is the gradient by its outputs
    times its inputs, of which both pass by."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def watch(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                values = inputs[0].detach().flatten(0, -2)

                def take(gradient: Tensor) -> None:
                    product = gradient.flatten(0, -2).T.to(values.dtype) @ values
                    found[name] = product if name not in found else found[name] + product

                if output.requires_grad:
                    output.register_hook(take)

            stack.enter_context(_removed(layer.register_forward_hook(watch)))
        yield found


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
