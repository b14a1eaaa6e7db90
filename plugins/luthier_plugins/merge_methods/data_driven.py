"""Methods that measure what each model does with data before they merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact, Context, DataError, ModelError
from luthier.artifacts.datasets import require_split
from luthier.artifacts.rows import conversations
from luthier.artifacts.tensors import tensor_headers
from luthier.merging.api import Granularity, MergeMethod, MergePart
from luthier_plugins.merge_methods.config import DataMethodConfig, FisherConfig, RegmeanConfig
from safetensors.torch import save_file
from torch import Tensor, nn

Prepared = list[Mapping[str, Path]]


def _rows(config: DataMethodConfig, model: Artifact, context: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, each of shape (1, tokens), of the first rows of the data."""
    from luthier.modeling.chat import ChatEncoder
    from luthier.modeling.loading import load_tokenizer
    from luthier.modeling.text import Encoded

    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"], context.date)
    for row in require_split(context.artifact(config.data), "train")[: config.rows]:
        if "text" in row:
            ids = encoder.document(row)
            made = [Encoded(ids, ids)]
        elif talks := conversations(row):
            made = encoder.conversation(talks[0])
        else:
            raise DataError("this method needs conversations or texts", hint="give `method.data` one of these")
        for encoded in made:
            ids, labels = encoded.input_ids[: config.max_length], encoded.labels[: config.max_length]
            if len(ids) > 1 and any(label >= 0 for label in labels[1:]):
                yield torch.tensor([ids]), torch.tensor([labels])


def _full(model: Artifact) -> Any:
    from luthier.modeling.loading import fold, load_model

    return fold(load_model(model)).eval()


def _average(part: MergePart) -> Tensor:
    """The weighted mean, for parameters of which the data says nothing."""
    total = sum(part.weights)
    first = part.tensors[0]
    merged = first.clone()
    for tensor, weight in zip(part.tensors[1:], part.weights[1:], strict=True):
        merged.add_(tensor.sub(first), alpha=weight / total)
    return merged


class Fisher(MergeMethod[FisherConfig]):
    """sum_i w_i F_i theta_i / sum_i w_i F_i with F_i the diagonal of model i's empirical Fisher information: the mean
    over rows of the squared gradient of the row's loss (Matena and Raffel 2021, arXiv:2111.09832, equation 6).
    """

    granularity: Granularity = "elementwise"

    def prepare(self, models: Sequence[Artifact]) -> Prepared:
        return [self._of(model, place) for place, model in enumerate(models)]

    def _of(self, model: Artifact, place: int) -> Mapping[str, Path]:
        self.context.log(f"Fisher information of {model.manifest.get('stage')}")
        network = _full(model)
        parameters = dict(network.named_parameters())
        totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        count = 0
        for ids, labels in _rows(self.config, model, self.context):
            self.context.progress(count, self.config.rows, "rows")
            network.zero_grad()
            network(input_ids=ids, labels=labels).loss.backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    totals[name] += parameter.grad.square()
            count += 1
        if not count:
            raise DataError("the data has no row with more than one token")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(totals[name] / count)
        # Written as the model itself would be, the entries lie where its weights lie, those of experts in tensors too.
        folder = self.context.scratch / f"fisher-{place}"
        network.save_pretrained(folder)
        return {name: folder / header.file for name, header in tensor_headers(folder).items()}

    def merge(self, part: MergePart) -> Tensor:
        if not part.extras:
            return _average(part)
        floor = part.parameter.value(self.config.floor)
        top = torch.zeros_like(part.tensors[0])
        bottom = torch.zeros_like(part.tensors[0])
        for tensor, information, weight in zip(part.tensors, part.extras, part.weights, strict=True):
            share = (information + floor) * weight
            top.addcmul_(share, tensor)
            bottom += share
        if bool((bottom == 0).any()):
            raise ModelError("the weights times the Fisher information sum to zero", where=part.parameter.name)
        return top / bottom


class Regmean(MergeMethod[RegmeanConfig]):
    """(sum_i w_i G_i)^-1 (sum_i w_i G_i W_i) for the linear layers, G_i the inner products of model i's inputs to the
    layer, off their diagonal times `alpha` (Jin et al. 2022, arXiv:2212.09849, equation 2); the rest is averaged.
    """

    granularity: Granularity = "matrix"

    def prepare(self, models: Sequence[Artifact]) -> Prepared:
        return [self._of(model, place) for place, model in enumerate(models)]

    def _of(self, model: Artifact, place: int) -> Mapping[str, Path]:
        """A file with the inner products of each layer's inputs: (in, in), or (1, in, in) where the layer keeps its
        weight as (in, out), as GPT-2 does.
        """
        from transformers.pytorch_utils import Conv1D

        self.context.log(f"inputs of the linear layers of {model.manifest.get('stage')}")
        network = _full(model)
        products: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                found = seen.T @ seen
                products[name] = products.get(name, 0) + (found[None] if isinstance(module, Conv1D) else found)

            return hook

        head = network.get_output_embeddings()
        for name, module in network.named_modules():
            # The head shares its rows with the embedding in many models, and is averaged like it.
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
                module.register_forward_pre_hook(watch(f"{name}.weight"))
        count = 0
        with torch.no_grad():
            for ids, _ in _rows(self.config, model, self.context):
                self.context.progress(count, self.config.rows, "rows")
                network(input_ids=ids)
                count += 1
        if not count:
            raise DataError("the data has no row with more than one token")
        path = self.context.scratch / f"gram-{place}.safetensors"
        save_file({name: (total / count).contiguous() for name, total in products.items()}, path)
        return dict.fromkeys(products, path)

    def merge(self, part: MergePart) -> Tensor:
        if not part.extras:
            return _average(part)
        # A third dimension means that the layer keeps its weight as (in, out), see `_of`.
        turned = part.extras[0].dim() == 3
        width, height = part.parameter.shape if turned else part.parameter.shape[::-1]
        alpha = part.parameter.value(self.config.alpha)
        device = part.tensors[0].device
        off = torch.full((width, width), alpha, dtype=torch.float64, device=device).fill_diagonal_(1.0)
        total = torch.zeros_like(off)
        right = torch.zeros(width, height, dtype=torch.float64, device=device)
        for tensor, products, weight in zip(part.tensors, part.extras, part.weights, strict=True):
            gram = products.view(width, width).double() * off * weight
            total += gram
            right += gram @ (tensor if turned else tensor.T).double()
        # Inputs that never occur leave the matrix singular: a little of the mean's pull settles them.
        ridge = 1e-8 * float(total.diagonal().mean())
        if ridge == 0:
            return _average(part)
        total.diagonal().add_(ridge)
        mean = torch.stack(list(part.tensors)).mean(dim=0).double()
        right += ridge * (mean if turned else mean.T)
        solved = torch.linalg.solve(total, right).float()
        return solved if turned else solved.T.contiguous()
