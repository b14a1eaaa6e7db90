"""What each kind of component has to do on a small example; loads torch only when it is called."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, get_args

from luthier.api.data import Row
from luthier.api.evaluation import Choice, Sample
from luthier.api.execution import RunInfo
from luthier.api.serving import Completion, Sampling
from luthier.api.training import CompletionBatch, Schedule, TokenBatch, Unit
from luthier.artifacts.rows import COLUMNS, SCHEMAS

TURNS = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]


def check_merge_method(impl: Any, config: Any) -> None:
    """It merges matrices, changes no input, and gives the same bits again."""
    import torch

    from luthier.merging.api import Granularity
    from luthier.merging.parts import merge_tensors

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


def check_metric(impl: Any, config: Any) -> None:
    """It gives a finite number and a value for each row."""
    import numpy as np

    need = impl.needs
    count = need.answers.n if need.answers is not None else 0
    offered = (need.choices.fixed or ("4", "6")) if need.choices is not None else ()

    def sample(question: str, answer: str, reference: str, logps: tuple[float, ...]) -> Sample:
        reference = reference if not offered or reference in offered else offered[0]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
        wide = np.log(np.full((len(logps), 4), 0.25, dtype=np.float32))
        return Sample(
            {"messages": messages},
            question,
            reference,
            tuple(Completion(answer, 2, "stop") for _ in range(count)),
            logps,
            tuple(range(len(logps))),
            (0,) * len(logps),
            tuple(Choice(text, (-1.0 - place,)) for place, text in enumerate(offered)),
            (lambda: wide) if need.distributions else None,
        )

    samples = [sample("2 + 2?", "4", "4", (-0.5, -2.0)), sample("3 + 3?", "5", "6", (-0.25,))]
    score = impl.score(samples, list(samples) if need.baseline else None)
    assert isinstance(score.value, float), f"the score is a {type(score.value).__name__}, not a float"
    assert math.isfinite(score.value), f"the score is {score.value}"
    assert len(score.by_row) == len(samples), f"it gives {len(score.by_row)} values for {len(samples)} rows"
    assert isinstance(impl.higher_is_better, bool), "it does not say whether higher is better"


def check_objective(impl: Any, config: Any) -> None:
    """It gives a finite loss for each unit, and gradients reach the log-probabilities."""
    import torch

    assert impl.unit in get_args(Unit), f"the unit is '{impl.unit}'"
    assert set(config.schemas) <= set(SCHEMAS), f"there is no schema {sorted(set(config.schemas) - set(SCHEMAS))[0]}"
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    logps = torch.linspace(-2.0, -0.25, len(owner)).requires_grad_()
    reference = torch.linspace(-1.5, -0.5, len(owner)) if "reference" in impl.needs else None

    def sums(values: Any) -> Any:
        return torch.zeros(4).index_add(0, owner, values)

    batch = CompletionBatch(
        logps,
        owner,
        sums(logps),
        torch.bincount(owner),
        reference,
        None if reference is None else sums(reference),
        torch.tensor([[0, 2], [1, 3]]) if "preference" in config.schemas else None,
        torch.tensor([True, False, True, False]) if "labelled" in config.schemas else None,
        mismatch=torch.tensor(0.5) if "mismatched" in impl.needs else None,
    )
    result = impl.loss(batch)
    expected = batch.count(impl.unit)
    assert result.losses.shape == (expected,), (
        f"the losses have the shape {tuple(result.losses.shape)}, not ({expected},)"
    )
    assert bool(torch.isfinite(result.losses).all()), "the losses have NaN or infinite values"
    result.losses.sum().backward()
    assert logps.grad is not None, "the loss does not depend on the log-probabilities"


def check_augmenter(impl: Any, config: Any) -> None:
    """It makes rows, the same ones for the same seed, and leaves those that it was given alone."""
    rows = [{"messages": TURNS}, {"messages": [{**TURNS[0], "content": "Greet me."}, TURNS[1]]}]
    before = json.dumps(rows)
    first, again = (list(impl.rows(rows)) for _ in range(2))
    assert first, "it made no rows"
    assert first == again, "the same seed gives different rows"
    assert json.dumps(rows) == before, "the given rows were changed"


def check_adapter(impl: Any, config: Any) -> None:
    """Some parameters can be trained, most cannot, and gradients reach those that can."""
    import torch

    from luthier.modeling.loading import load_model
    from luthier.testing.stages import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        options = json.loads(json.dumps(dict(impl.load_options())))
        wrapped = impl.wrap(load_model(tiny_model(Path(folder)), options=options))
        trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in wrapped.parameters() if not parameter.requires_grad]
        assert trainable, "nothing can be trained"
        assert frozen, "the whole base can be trained: that is not an adapter"
        loss = wrapped(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss
        loss.backward()
        assert any(parameter.grad is not None for parameter in trainable), "no gradient reaches the adapter"


def _batch() -> TokenBatch:
    import torch

    ids = torch.arange(16).view(2, 8)
    sources = torch.tensor([*range(7), *range(8, 15)])
    return TokenBatch(ids, torch.ones_like(ids), sources, ids.flatten()[sources + 1], sources // 8, 2)


def check_regularizer(impl: Any, config: Any) -> None:
    """Its penalty is a finite scalar."""
    import torch

    from luthier.modeling.loading import load_model
    from luthier.testing.stages import tiny_model

    owner = torch.arange(2).repeat_interleave(7)
    logps = torch.full((14,), -1.0, requires_grad=True)
    outputs = CompletionBatch(logps, owner, logps.view(2, 7).sum(1), torch.tensor([7, 7]))
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(tiny_model(Path(folder)))
        impl.start(model, lambda: iter([_batch()]))
        penalty = impl.penalty(model, _batch(), outputs)
    assert penalty.ndim == 0, "the penalty is not a scalar"
    assert bool(torch.isfinite(penalty)), "the penalty is NaN or infinite"


def check_optimizer(impl: Any, config: Any) -> None:
    """A few steps on a small problem lower its loss."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    inputs = torch.randn(16, 4)
    optimizer, scheduler = impl.make(model, Schedule(8, 2, 1e-2, "linear", 0.0))
    losses: list[float] = []
    for _ in range(8):
        loss = (model(inputs) - inputs).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert losses[-1] < losses[0], f"after 8 steps the loss is {losses[-1]:.4g}, it was {losses[0]:.4g}"


def check_reward(impl: Any, config: Any) -> None:
    """It scores every completion."""
    rows: list[Row] = [{"prompt": [TURNS[0]], "answer": "4"}] * 2
    scores = list(impl.score([Completion("4", 2, "stop"), Completion("5", 2, "length")], rows))
    assert len(scores) == 2, f"it gives {len(scores)} scores for 2 completions"
    assert all(score is None or math.isfinite(score) for score in scores), f"the scores are {scores}"


def check_generator(impl: Any, config: Any) -> None:
    """It is a context manager that answers; what it answers depends on what it is connected with."""
    assert hasattr(impl, "__enter__"), "it is not a context manager"
    assert Sampling().n == 1


def check_tracker(impl: Any, config: Any) -> None:
    """It takes a stage from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        info = RunInfo("run", "recipe", "stage", "sft", "0" * 64, {"steps": 1}, {"python": "3"}, False, Path(folder))
        impl.start(info)
        impl.log({"loss": 1.5}, 1)
        impl.finish("done", {"rows": {"train": 1}})


def check_format(impl: Any, config: Any) -> None:
    """Its rows are of a known schema."""
    assert impl.schema in SCHEMAS, f"there is no schema '{impl.schema}'"
    assert not impl.recognises({"no such key": 1}), "it recognises a row with none of its keys"
    assert COLUMNS[impl.schema], "its schema has no columns"


def check_executor(impl: Any, config: Any) -> None:
    """Its slots are sound ones."""
    from luthier.running.slots import check_slots

    check_slots(list(impl.slots()), type(impl).__name__)
