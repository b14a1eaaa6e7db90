"""How much fits into memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch

from luthier.api.artifact import Artifact
from luthier.api.context import Context
from luthier.api.errors import ModelError
from luthier.api.estimates import Shape, memory_of
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.models import model_facts
from luthier.modeling.loading import model_folder
from luthier.modeling.precision import Precision
from luthier.training.encoding import EncodedRow
from luthier.training.passes import Limits, Passes
from luthier.training.trainer import within_memory

AT_MOST = {"cpu": 8192, "cuda": 16384}
"""Tokens of a pass: more do not make it faster."""
SHARE = 0.5
"""Of the memory that is free, what activations may take by an estimate, ..."""
MEASURED = 0.9
"""... and of all that is there, what a pass may take by what smaller ones took."""
MOMENTS = 8
"""Bytes of an optimizer's states for each weight that is trained; they are made in the first step."""


def limits_of(config: TrainingConfig, model: Any, context: Context, precision: Precision) -> Limits:
    """How much a pass takes at the beginning; it becomes less where that does not fit."""
    if isinstance(config.micro_batch_size, int):
        return Limits(None, config.micro_batch_size)
    most = AT_MOST[torch.device(context.device).type]
    fitting = int(free_memory(context) * SHARE / activation_bytes(model, precision))
    return Limits(max(1, min(most, fitting)), None)


def check_room(config: TrainingConfig, source: Artifact, context: Context) -> None:
    """Refuse a model that the machine has no memory for, before it is loaded.

    Raises:
        ModelError: weights, gradients and the optimizer's states alone are more than all that there is.
    """
    shape = Shape.of(model_facts(model_folder(source)) if source.kind == "adapter" else source.facts)
    if shape is None or config.train or config.experts is not None:
        return
    training = replace(config.training_of(0.0), pass_tokens=0)
    if source.kind == "adapter":
        options = source.facts.get("load_options", {})
        bits = 4 if options.get("quantization", {}).get("load_in_4bit") else 8
        base = f"{bits}bit" if "quantization" in options else "bf16" if "dtype" in options else "fp32"
        training = replace(training, rank=0, base=base)
    needed = memory_of(shape, training)
    there = psutil.virtual_memory().total if context.device == "cpu" else torch.cuda.mem_get_info()[1]
    if needed > there:
        raise ModelError(
            f"training it takes {needed / 1e9:.3g} GB of memory without a single row, and there are {there / 1e9:.3g}",
            hint="train an adapter (`adapter: qlora` takes least), or fewer weights (`train`), with `adamw8bit`",
        )


def fits(model: Any, longest: int, context: Context, precision: Precision) -> bool:
    """Whether the activations of the longest row are likely to fit."""
    return longest * activation_bytes(model, precision) < free_memory(context) * SHARE


def free_memory(context: Context) -> int:
    """Bytes that nothing uses, of the GPU where there is one."""
    return psutil.virtual_memory().available if context.device == "cpu" else torch.cuda.mem_get_info()[0]


def measure_limits(passes: Passes, rows: Sequence[EncodedRow]) -> None:
    """Let passes take as many tokens as the GPU has room for, by what the longest row takes, and the two longest.

    Gradients that it makes are thrown away.
    """
    known = getattr(rows, "lengths", None)
    lengths = np.array([len(row) for row in rows]) if known is None else known
    longest = [rows[int(place)] for place in np.argsort(-lengths, kind="stable")[:2]]
    if len(longest) < 2:
        return
    passes.model.train()
    passes.limits.tokens = AT_MOST["cuda"]
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    peaks: list[int] = []
    tokens: list[int] = []
    for some in (longest[:1], longest):
        before = passes.limits.tokens
        torch.cuda.reset_peak_memory_stats()
        within_memory(passes, some, lambda some=some: passes.step(some, torch.Tensor.backward))
        peaks.append(torch.cuda.max_memory_allocated())
        tokens.append(passes.layout.tokens(some))
        if passes.limits.tokens != before:
            # Two do not fit: one is what there is room for.
            break
    else:
        whole = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        room = MEASURED * whole - _made_later(passes.model)
        slope = max(1.0, (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]))
        fitting = tokens[1] + int((room - peaks[1]) / slope)
        passes.limits.tokens = max(tokens[0], min(AT_MOST["cuda"], fitting))
    for parameter in passes.model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.set_rng_state(drawn[0])
    torch.cuda.set_rng_state_all(drawn[1])


def _made_later(model: Any) -> int:
    """Bytes of the optimizer's states, and of gradients, as far as they are not there yet."""
    return MOMENTS * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def activation_bytes(model: Any, precision: Precision) -> int:
    """About how many bytes a token takes from its forward to its backward pass."""
    text = model.config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    return (2 if precision == "bf16" else 4) * text.num_hidden_layers * (16 * width + 5 * inner)
