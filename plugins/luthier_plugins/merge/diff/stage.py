"""The stage ``diff``."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import torch
from luthier.api import Facts, Stage
from luthier.merging.api import MergedParameter, MergePart
from luthier.merging.check import check_same
from luthier.merging.files import DTYPES
from luthier.merging.jobs import Operand, TensorJob, scan_of
from luthier.merging.layout import LAYER, Inputs, depth_of, layers_of
from luthier.merging.merge import open_inputs
from luthier.reporting.heat_map import page
from luthier_plugins.merge.diff.config import DiffConfig
from torch import Tensor


class Diff(Stage[DiffConfig]):
    """Cosine, relative norm and sign agreement of each pair of models, or of their task vectors."""

    def run(self) -> Facts:
        context = self.context
        with ExitStack() as stack:
            base = context.artifact(self.config.base) if self.config.base else None
            inputs = open_inputs(context.artifacts(self.config.models), base, context, stack)
            check_same(inputs)
            labels = _labels([model.label for model in inputs.models])
            tensors = [name for name, header in inputs.lead.headers.items() if header.dtype in DTYPES]
            sums: dict[str, Tensor] = {}
            for done, name in enumerate(tensors):
                context.progress(done, len(tensors), "tensors")
                sums[name] = _sums(inputs, name)
        rows = {name: _numbers(found, labels) for name, found in sums.items()}
        layers = {name: _numbers(found, labels) for name, found in _by_layer(sums).items()}
        whole = _numbers(sum(sums.values(), torch.zeros_like(next(iter(sums.values())))), labels)
        report = {
            "models": labels,
            "base": inputs.base.label if inputs.base else None,
            "whole": whole,
            "layers": layers,
            "tensors": rows,
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        (context.out / "report.html").write_text(page(report), encoding="utf-8")
        columns = list(next(iter(layers.values())))
        table = {
            "columns": columns,
            "rows": [["whole", *whole.values()], *([n, *v.values()] for n, v in layers.items())],
        }
        return {"table": table, "page": "report.html"}


def _labels(names: list[str]) -> list[str]:
    """The models' names; the second of a name gets a number."""
    return [
        name if name not in names[:place] else f"{name} {names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _sums(inputs: Inputs, name: str) -> Tensor:
    """What all numbers are made of, added up over a tensor: float64, shape (models + 1, models, 3).

    [i, j, 0] is the inner product of vectors i and j, [i, j, 1] the number of entries in which both have the same sign,
    [i, j, 2] that of entries in which neither is zero, and the last row has the squared norm of the base (or of the
    first model).
    """
    shape = inputs.lead.headers[name].shape
    count = len(inputs.models)
    base = Operand(inputs.base, name) if inputs.base else None
    job = TensorJob(
        MergedParameter(name, shape, 0.0, count), [Operand(model, name) for model in inputs.models], base, [1.0] * count
    )

    def statistics(part: MergePart) -> Tensor:
        vectors = list(part.tensors) if part.base is None else part.deltas
        found = torch.zeros(count + 1, count, 3, dtype=torch.float64)
        signs = [vector.sign() for vector in vectors]
        for one in range(count):
            for two in range(one + 1):
                found[one, two, 0] = found[two, one, 0] = float((vectors[one] * vectors[two]).sum())
                both = signs[one] * signs[two]
                found[one, two, 1] = found[two, one, 1] = float(both.gt(0).sum())
                found[one, two, 2] = found[two, one, 2] = float(both.count_nonzero())
        anchor = part.tensors[0] if part.base is None else part.base
        found[count, 0, 0] = float(anchor.square().sum())
        return found

    return scan_of(job)(statistics) if math.prod(shape) else torch.zeros(count + 1, count, 3, dtype=torch.float64)


def _by_layer(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    counts = layers_of(list(sums))
    found: dict[str, Tensor] = {}
    for name in sorted(sums, key=lambda name: (LAYER.match(name) is not None, depth_of(name, counts))):
        match = LAYER.match(name)
        stack = f"{match['head'].removesuffix('.')} " if match and len(counts) > 1 else ""
        key = f"{stack}layer {match['number']}" if match else name.removesuffix(".weight")
        found[key] = found[key] + sums[name] if key in found else sums[name].clone()
    return found


def _numbers(sums: Tensor, labels: list[str]) -> dict[str, Any]:
    """The numbers that are shown, by column; None where there is none."""
    count = len(labels)
    anchor = float(sums[count, 0, 0])
    norms = [math.sqrt(float(sums[place, place, 0])) for place in range(count)]
    found: dict[str, Any] = {}
    for one, two in combinations(range(count), 2):
        size = norms[one] * norms[two]
        pair = f"{labels[one]}, {labels[two]}"
        both = float(sums[one, two, 2])
        # Where one of them has not changed, there is nothing to compare.
        found[f"cosine {pair}"] = float(sums[one, two, 0]) / size if size > 0 else None
        found[f"same sign {pair}"] = float(sums[one, two, 1]) / both if both else None
    for place, label in enumerate(labels):
        found[f"norm {label}"] = norms[place] / math.sqrt(anchor) if anchor > 0 else 0.0
    return found
