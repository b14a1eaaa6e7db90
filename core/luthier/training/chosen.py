"""Which weights of a model are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.api.tuning import TrainingConfig
from luthier.training.encoding import EncodedRow
from luthier.training.experts import choose_experts, router_weights

WORD = "routers"
"""Stands for the weights of all routers, whatever an architecture calls them."""


def choose(model: Any, config: TrainingConfig, rows: Sequence[EncodedRow], context: StageContext) -> None:
    """Freeze what a config does not train.

    Raises:
        ModelError: it names what the model has not.
    """
    if config.train or config.experts is not None:
        choose_weights(model, config.train, context)
    if config.experts is not None:
        choose_experts(model, config.experts, rows, context)


def choose_weights(model: Any, patterns: Sequence[str], context: StageContext) -> None:
    """Train the weights whose names match a pattern, and none besides.

    Raises:
        ModelError: a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        found = (
            router_weights(model) if pattern == WORD else [name for name in parameters if fnmatchcase(name, pattern)]
        )
        if not found:
            kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in parameters})
            raise ModelError(
                f"`train` has the pattern '{pattern}', which no weight matches",
                hint=f"they are called {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}",
            )
        count = sum(parameters[name].numel() for name in found)
        context.log(f"`{pattern}` trains {len(found)} tensors with {count / 1e6:.3g} M weights")
        chosen |= set(found)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
