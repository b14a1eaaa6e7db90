"""Adapters folded into the weights they sit on, tensor by tensor."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import psutil
import torch

from luthier.api import Artifact
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json, write_json
from luthier.merging.files import DTYPES, Scratch
from luthier.merging.lowrank import Unfoldable
from luthier.merging.merge import carry
from luthier.merging.parts import Grid
from luthier.merging.reader import Weights
from luthier.merging.writer import Described, Output, size_of
from luthier.modeling.loading import SHARD, check_folded, folded_by_peft, with_dtype

COPIES = 2.5
"""How many times its size in float32 a model takes while it is compared with its adapter on its base."""


def full_weights(artifact: Artifact, scratch: Path) -> Path:
    """A folder with the artifact's weights in full: its own, or `scratch` with its adapter folded in.

    Folding is done and kept in float32 on the full-precision base, whatever the adapter was trained on. Of low-rank
    adapters one part of a tensor is in memory at a time; others are folded by PEFT, in memory. Where the model fits
    there, what comes out is compared with the adapter on its base.

    Raises:
        ModelError: folded in, the adapter behaves differently, or an entry is not finite.
    """
    if artifact.kind != "adapter":
        return artifact.path
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        weights = Weights(artifact)
    except Unfoldable:
        return folded_by_peft(artifact, scratch)
    with closing(weights):
        size = _write(weights, scratch)
    config = with_dtype(read_json(artifact.base.path / "config.json"), "float32")
    carry(artifact, scratch)
    write_json(scratch / "config.json", config)
    if COPIES * size < psutil.virtual_memory().available:
        check_folded(artifact, scratch)
    return scratch


def _write(weights: Weights, out: Path) -> int:
    """Write every tensor, floats as float32; gives their bytes."""
    tensors = {
        name: Described("F32" if header.dtype in DTYPES else header.dtype, header.shape)
        for name, header in weights.headers.items()
    }
    size = size_of(tensors)
    check_disk_space(out, size, "the model with the adapter folded in")
    output, scratch = Output(out, tensors, SHARD), Scratch()
    with closing(output):
        for name, about in tensors.items():
            if weights.headers[name].dtype not in DTYPES:
                raw = torch.empty(about.bytes, dtype=torch.uint8)
                weights.raw(name, 0, raw)
                output.raw(name, 0, raw)
                continue
            grid = Grid.of(about.shape) if math.prod(about.shape) else Grid(0, 1)
            for first, last in grid.spans():
                rows = scratch.floats(0, (last - first) * grid.columns).view(-1, grid.columns)
                weights.read(name, first * grid.columns, rows, scratch)
                output.write(name, first * grid.columns, rows, scratch)
        output.sync()
    return size
