"""Low-rank factors of matrices, and adapters written as PEFT reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from luthier.api import Artifact, Facts, ModelError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS, adapter_facts, write_adapter_config
from luthier.artifacts.models import carry_text_files
from luthier.merging.devices import best_device, with_cpu_fallback
from luthier.merging.lowrank import WRAPPED
from luthier.modeling.adapters import check_adapter
from safetensors.torch import save_file
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""B of shape (out, r) and A of shape (r, in)."""


def low_rank(matrix: Tensor, r: int | None, energy: float | None) -> tuple[Factors, float]:
    """The best approximation of a matrix by a product B A (Eckart and Young 1936).

    Args:
        matrix: Shape (out, in).
        r: The rank, at most.
        energy: The share of the sum of squared singular values to keep; the rank follows from it.

    Returns:
        The factors, each with the square root of the singular values, and the share that is kept.
    """

    def work(device: str) -> list[Tensor]:
        return [found.cpu() for found in torch.linalg.svd(matrix.to(device), full_matrices=False)]

    u, s, vh = with_cpu_fallback(work, best_device(matrix.numel()))
    squares = s.double().square()
    total = float(squares.sum())
    rank = len(s)
    if energy is not None and total > 0:
        enough = squares.cumsum(0) >= energy * total * (1 - 1e-12)
        rank = int(enough.nonzero()[0]) + 1 if bool(enough.any()) else rank
    rank = max(1, min(rank, r or rank))
    root = s[:rank].sqrt()
    kept = float(squares[:rank].sum()) / total if total > 0 else 1.0
    return ((u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()), kept


def write_adapter(
    out: Path, factors: Mapping[str, Factors], base: Artifact, text: Artifact, *, transposed: bool = False
) -> Facts:
    """Write an adapter, look at it as its users will, and return its facts.

    Args:
        factors: Factors by the name of the module whose weight they change.
        base: The model that it sits on.
        text: The model or adapter whose tokenizer, template and generation config go along.
        transposed: Whether the modules keep their weights as (in, out).

    Raises:
        ModelError: an entry is NaN or infinite, or PEFT does not find on the base what was written.
    """
    import peft

    odd = [name for name, pair in factors.items() if not all(bool(torch.isfinite(factor).all()) for factor in pair)]
    if odd:
        raise ModelError(f"the update of {odd[0]} has NaN or infinite values", hint="nothing was written")
    ranks = {module: pair[1].shape[0] for module, pair in factors.items()}
    largest = max(ranks.values())
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(factors),
        fan_in_fan_out=transposed,
        # B A is the whole update: every module's scale is 1.
        rank_pattern={module: rank for module, rank in ranks.items() if rank != largest},
        alpha_pattern={module: rank for module, rank in ranks.items() if rank != largest},
        task_type="CAUSAL_LM",
    )
    config.inference_mode = True
    config.save_pretrained(str(out))
    tensors = {
        f"{WRAPPED}{module}.lora_{letter}.weight": tensor.contiguous()
        for module, pair in factors.items()
        for letter, tensor in (("B", pair[0]), ("A", pair[1]))
    }
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_adapter_config(out, base)
    check_adapter(out, base.path)
    carry_text_files(text.path, out)
    return adapter_facts(out, base.key, text)
