"""The merge methods: their laws, and mergekit as the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier_plugins.merge_methods.config import LinearConfig, SlerpConfig, TiesConfig
from luthier_plugins.merge_methods.linear import Linear
from luthier_plugins.merge_methods.slerp import Slerp
from luthier_plugins.merge_methods.ties import Ties, trim
from mergekit.merge_methods.slerp import slerp as mergekit_slerp
from mergekit.sparsify import magnitude

seeds = st.integers(0, 10_000)


def tensors(seed: int, count: int) -> list[torch.Tensor]:
    """Random parameters of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator) for _ in range(count)]


@given(seeds, st.integers(2, 4), st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_linear_of_equal_models_is_the_model_bit_for_bit(seed: int, count: int, weights: list[float]) -> None:
    (one,) = tensors(seed, 1)
    assert torch.equal(Linear(LinearConfig()).merge([one] * count, weights[:count], None), one)


@given(seeds)
def test_linear_with_one_hot_weights_is_that_model(seed: int) -> None:
    a, b = tensors(seed, 2)
    torch.testing.assert_close(Linear(LinearConfig()).merge([a, b], [0.0, 1.0], None), b)
    torch.testing.assert_close(Linear(LinearConfig(normalize=False)).merge([a, b], [2.0, 1.0], None), 2 * a + b)


@given(seeds)
def test_slerp_ends_at_its_models_and_is_symmetric(seed: int) -> None:
    a, b = tensors(seed, 2)
    assert torch.equal(Slerp(SlerpConfig(t=0)).merge([a, b], [1, 1], None), a)
    assert torch.equal(Slerp(SlerpConfig(t=1)).merge([a, b], [1, 1], None), b)
    there = Slerp(SlerpConfig(t=0.3)).merge([a, b], [1, 1], None)
    back = Slerp(SlerpConfig(t=0.7)).merge([b, a], [1, 1], None)
    torch.testing.assert_close(there, back)


@given(seeds, st.floats(0.05, 0.95))
def test_slerp_equals_mergekit(seed: int, t: float) -> None:
    # mergekit keeps a leading axis of outputs; one output is the whole tensor.
    a, b = (tensor.flatten() for tensor in tensors(seed, 2))
    ours = Slerp(SlerpConfig(t=t)).merge([a, b], [1, 1], None)
    torch.testing.assert_close(ours, mergekit_slerp(torch.tensor([t]), a[None], b[None])[0], rtol=1e-4, atol=1e-5)


def test_slerp_of_collinear_tensors_is_a_straight_line() -> None:
    (a,) = tensors(0, 1)
    torch.testing.assert_close(Slerp(SlerpConfig(t=0.25)).merge([a, 3 * a], [1, 1], None), 1.5 * a)
    zero = torch.zeros_like(a)
    assert torch.equal(Slerp(SlerpConfig()).merge([zero, zero], [1, 1], None), zero)


@given(seeds)
def test_ties_at_density_zero_is_the_base(seed: int) -> None:
    base, a, b = tensors(seed, 3)
    assert torch.equal(Ties(TiesConfig(density=0)).merge([a, b], [1, 1], base), base)


@given(seeds, st.floats(0.1, 1.0))
def test_trim_equals_mergekit(seed: int, density: float) -> None:
    (delta,) = tensors(seed, 1)
    # mergekit rounds the number of kept entries down, Luthier to the nearest.
    exact = int(density * delta.numel()) / delta.numel()
    torch.testing.assert_close(trim(delta, exact), magnitude(delta, density=exact + 1e-6))


def test_ties_keeps_what_agrees_with_the_elected_sign() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([4.0, 1.0, -3.0, 0.1]), torch.tensor([2.0, -5.0, -1.0, 0.2])
    merged = Ties(TiesConfig(density=0.75)).merge([a, b], [1, 1], base)
    assert torch.allclose(merged, torch.tensor([3.0, -5.0, -2.0, 0.0]))


def test_trim_breaks_ties_by_the_lowest_index() -> None:
    assert trim(torch.tensor([1.0, -1.0, 1.0, 0.5]), 0.5).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_slerp_takes_two_models() -> None:
    with pytest.raises(Exception, match="slerp takes two models, not 3"):
        Slerp(SlerpConfig()).merge(tensors(0, 3), [1, 1, 1], None)
