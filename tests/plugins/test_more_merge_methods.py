"""Merge methods against mergekit's own, through its public `merge_tensors`; and mergekit as a back end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import ModelError
from luthier.testing import run_stage, tiny_model
from luthier_plugins.merge_methods.config import MergekitConfig, ModelStockConfig, TaskArithmeticConfig, TiesConfig
from luthier_plugins.merge_methods.mergekit import Mergekit
from luthier_plugins.merge_methods.model_stock import ModelStock
from luthier_plugins.merge_methods.task_arithmetic import TaskArithmetic
from luthier_plugins.merge_methods.ties import Ties
from mergekit.merge_methods import merge_tensors

seeds = st.integers(0, 10_000)


def models(seed: int, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 5, generator=generator)
    return base, [base + 0.3 * torch.randn(7, 5, generator=generator) for _ in range(count)]


@given(seeds, st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0.1, 1.5))
def test_task_arithmetic_equals_mergekit(seed: int, one: float, two: float, scale: float) -> None:
    base, tensors = models(seed, 2)
    ours = TaskArithmetic(TaskArithmeticConfig(scale=scale)).merge(tensors, [one, two], base)
    parameters = {"weight": {1: one, 2: two}, "lambda": scale}
    theirs = merge_tensors([base, *tensors], "task_arithmetic", parameters=parameters, base_index=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(seeds, st.integers(2, 4))
def test_model_stock_equals_mergekit(seed: int, count: int) -> None:
    base, tensors = models(seed, count)
    ours = ModelStock(ModelStockConfig()).merge(tensors, [1.0] * count, base)
    theirs = merge_tensors([base, *tensors], "model_stock", base_index=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@given(seeds)
def test_model_stock_of_equal_models_is_the_model(seed: int) -> None:
    base, (one,) = models(seed, 1)
    torch.testing.assert_close(ModelStock(ModelStockConfig()).merge([one, one, one], [1, 1, 1], base), one)
    opposite = base - (one - base)
    torch.testing.assert_close(ModelStock(ModelStockConfig()).merge([one, opposite], [1, 1], base), base)


def test_model_stock_refuses_weights() -> None:
    base, tensors = models(0, 2)
    with pytest.raises(ModelError, match="leave `weights` out"):
        ModelStock(ModelStockConfig()).merge(tensors, [1.0, 2.0], base)


@given(seeds, st.floats(0.2, 1.0))
def test_mergekit_as_a_back_end_gives_what_mergekit_gives(seed: int, density: float) -> None:
    base, tensors = models(seed, 3)
    method = Mergekit(MergekitConfig(name="ties", parameters={"density": density}))
    assert method.needs_base
    before = [tensor.clone() for tensor in tensors]
    ours = method.merge(tensors, [1.0, 2.0, 0.5], base)
    parameters = {"weight": {1: 1.0, 2: 2.0, 3: 0.5}, "density": density}
    torch.testing.assert_close(ours, merge_tensors([base, *tensors], "ties", parameters=parameters, base_index=0))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


def test_our_ties_equals_mergekit_s_where_no_entries_tie() -> None:
    base, tensors = models(3, 3)
    ours = Ties(TiesConfig(density=0.4)).merge(tensors, [1.0, 2.0, 0.5], base)
    theirs = Mergekit(MergekitConfig(name="ties", parameters={"density": 0.4})).merge(tensors, [1.0, 2.0, 0.5], base)
    torch.testing.assert_close(ours, theirs)


def test_random_masks_come_from_the_recipe_alone() -> None:
    base, tensors = models(1, 2)
    config = MergekitConfig(name="dare_ties", parameters={"density": 0.5}, seed=4)
    torch.manual_seed(1)
    first = Mergekit(config).merge(tensors, [1.0, 1.0], base)
    torch.manual_seed(2)
    assert torch.equal(Mergekit(config).merge(tensors, [1.0, 1.0], base), first)
    other = Mergekit(config.model_copy(update={"seed": 9})).merge(tensors, [1.0, 1.0], base)
    assert not torch.equal(other, first)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"name": "tiess"}, "did you mean 'ties'"), ({"name": "ties", "parameters": {"densty": 1}}, "density")],
)
def test_what_mergekit_does_not_have_is_named(values: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Mergekit(MergekitConfig(**values))
    assert message in str(caught.value)


def test_whole_models_merge_through_mergekit(tmp_path: Path) -> None:
    base, one, two = (tiny_model(tmp_path, seed=seed) for seed in range(3))
    config = {"method": {"uses": "mergekit", "name": "della", "parameters": {"density": 0.7, "epsilon": 0.1}}}
    merged = run_stage(tmp_path, "merge", config, inputs={"models": [one, two], "base": base})
    assert merged.facts["tensors"] == base.facts["tensors"]
