"""What each kind of component has to do on a small example; loads torch only when it is called."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from luthier.api.component import Kind
from luthier.api.protocols import Prediction, PreferenceBatch, TokenLoss
from luthier.merging.api import Granularity, MergeMethodConfig


def _merge(impl: Any, config: Any) -> None:
    import torch

    from luthier.merging.parts import merge_tensors

    assert isinstance(config, MergeMethodConfig), f"{type(config).__name__} is no MergeMethodConfig"
    assert impl.granularity in get_args(Granularity), f"the granularity is '{impl.granularity}'"

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    least, most = config.models
    tensors = [base + 0.1 * torch.randn(8, 6, generator=generator) for _ in range(max(least, min(2, most or 2)))]
    before = [tensor.clone() for tensor in [*tensors, base]]
    # Where a base is optional, the method has to do without one.
    ancestor = base if config.base == "required" else None
    results = [merge_tensors(impl, tensors, base=ancestor) for _ in range(2)]
    assert results[0].shape == base.shape, f"the result has the shape {tuple(results[0].shape)}"
    assert results[0].dtype == torch.float32, f"the result has the dtype {results[0].dtype}"
    assert bool(torch.isfinite(results[0]).all()), "the result has NaN or infinite values"
    same = all(torch.equal(old, new) for old, new in zip(before, [*tensors, base], strict=True))
    assert same, "the inputs were changed"
    assert torch.equal(results[0], results[1]), "the same inputs give two different results"


def _metric(impl: Any, config: Any) -> None:
    items: list[Any] = [Prediction("2 + 2?", "4", "4"), Prediction("3 + 3?", "5", "6")]
    if impl.needs == "losses":
        items = [TokenLoss(2.5, 3), TokenLoss(0.5, 2)]
    score = impl.score(items)
    assert isinstance(score, float), f"the score is a {type(score).__name__}, not a float"
    assert math.isfinite(score), f"the score is {score}"


def _preference_loss(impl: Any, config: Any) -> None:
    import torch

    chosen = torch.tensor([-5.0, -9.0, -4.0], requires_grad=True)
    rejected = torch.tensor([-6.0, -7.0, -4.5], requires_grad=True)
    reference = (torch.tensor([-5.5, -8.0, -4.0]), torch.tensor([-5.5, -8.0, -5.0]))
    before = reference if impl.needs_reference else (None, None)
    lengths = (torch.tensor([4, 6, 3]), torch.tensor([5, 5, 4]))
    loss = impl.loss(PreferenceBatch(chosen, rejected, *before, *lengths), 0.1)
    assert loss.shape == chosen.shape, f"the loss has the shape {tuple(loss.shape)}, expected one value a pair"
    assert bool(torch.isfinite(loss).all()), "the loss has NaN or infinite values"
    loss.sum().backward()
    assert rejected.grad is not None, "the loss does not depend on the rejected answer"
    assert bool((rejected.grad >= 0).all()), "a likelier rejected answer lowers the loss"


def _augmenter(impl: Any, config: Any) -> None:
    turns = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]
    rows = [{"messages": turns}, {"messages": [{**turns[0], "content": "Greet me."}, turns[1]]}]
    before = json.dumps(rows)
    first, again = (list(impl.rows(rows, 3)) for _ in range(2))
    assert first, "it made no rows"
    assert first == again, "the same seed gives other rows"
    assert json.dumps(rows) == before, "the given rows were changed"


def _adapter(impl: Any, config: Any) -> None:
    import torch

    from luthier.modeling.loading import load_model
    from luthier.testing.stages import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        artifact = tiny_model(Path(folder))
        wrapped = impl.wrap(load_model(artifact, options=impl.load_options()))
        trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in wrapped.parameters() if not parameter.requires_grad]
        assert trainable, "nothing can be trained"
        assert frozen, "the whole base can be trained: that is no adapter"
        loss = wrapped(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss
        loss.backward()
        assert any(parameter.grad is not None for parameter in trainable), "no gradient reaches the adapter"


def _regularizer(impl: Any, config: Any) -> None:
    import torch

    from luthier.modeling.loading import load_model
    from luthier.testing.stages import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = load_model(tiny_model(Path(folder)))
    impl.start(model)
    penalty = impl.penalty(model)
    assert penalty.ndim == 0, "the penalty is not a scalar"
    assert bool(torch.isfinite(penalty)), "the penalty is NaN or infinite"


def _tracker(impl: Any, config: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        impl.start(Path(folder), "stage")
        impl.log({"loss": 1.5}, 1)
        impl.finish()


def _format(impl: Any, config: Any) -> None:
    columns = cast("tuple[str, ...]", impl.columns)
    assert columns, "it names no columns"


BEHAVIOUR: dict[Kind, Callable[[Any, Any], None]] = {
    "adapter": _adapter,
    "augmenter": _augmenter,
    "format": _format,
    "merge": _merge,
    "metric": _metric,
    "preference_loss": _preference_loss,
    "regularizer": _regularizer,
    "tracker": _tracker,
}
"""The kinds whose behaviour a small example can show; the others are checked by their own tests."""
