"""Objectives against TRL's losses, and against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import CompletionBatch
from luthier_plugins.objectives.config import CrossEntropyConfig, DpoConfig, OrpoConfig
from luthier_plugins.objectives.cross_entropy import CrossEntropy
from luthier_plugins.objectives.dpo import Dpo
from luthier_plugins.objectives.orpo import Orpo, log_odds

log_probabilities = st.lists(st.floats(-60, -0.01), min_size=2, max_size=6)


def batch(chosen: list[float], rejected: list[float], *, reference: float | None = None) -> CompletionBatch:
    """Pairs whose completions have 3 and 5 tokens, all of a completion equally likely."""
    count = min(len(chosen), len(rejected))
    sums = torch.tensor([*chosen[:count], *rejected[:count]])
    lengths = torch.tensor([3] * count + [5] * count)
    owner = torch.repeat_interleave(torch.arange(2 * count), lengths)
    before = None if reference is None else torch.full((2 * count,), reference)
    pairs = torch.tensor([[place, count + place] for place in range(count)])
    logps = (sums / lengths)[owner]
    return CompletionBatch(
        logps, owner, sums, lengths, None if before is None else (before / lengths)[owner], before, pairs
    )


@given(log_probabilities, log_probabilities, st.floats(0.01, 2))
def test_orpo_is_the_nll_and_trl_s_odds_ratio(chosen: list[float], rejected: list[float], beta: float) -> None:
    from trl.experimental.orpo import ORPOTrainer

    pairs = batch(chosen, rejected)
    means = [sums / lengths for sums, lengths in zip(pairs.sides(pairs.sums), pairs.sides(pairs.lengths), strict=True)]
    stand_in = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(stand_in, *means)[0]
    mine = Orpo(OrpoConfig(beta=beta), None).loss(pairs).losses
    torch.testing.assert_close(mine, -means[0] - theirs, rtol=1e-4, atol=1e-5)


@given(st.floats(-80, -1e-6))
def test_log_odds_and_their_gradient_are_accurate(value: float) -> None:
    exact = torch.tensor(value, dtype=torch.float64)
    x = torch.tensor(value, requires_grad=True)
    result = log_odds(x)
    right = exact - torch.log(-torch.expm1(exact))
    assert float(result) == pytest.approx(float(right), rel=1e-4, abs=1e-4)
    result.backward()
    assert x.grad is not None
    # d/dx of x - log(1 - exp(x)) is 1 / (1 - exp(x)).
    assert float(x.grad) == pytest.approx(float(-1 / torch.expm1(exact)), rel=2e-2)


@given(log_probabilities, log_probabilities, st.floats(0.01, 2))
def test_smoothed_dpo_weighs_both_orders(chosen: list[float], rejected: list[float], beta: float) -> None:
    known, swapped = batch(chosen, rejected, reference=0.0), batch(rejected, chosen, reference=0.0)
    plain = Dpo(DpoConfig(beta=beta), None)
    smooth = Dpo(DpoConfig(beta=beta, label_smoothing=0.2), None).loss(known).losses
    torch.testing.assert_close(smooth, 0.8 * plain.loss(known).losses + 0.2 * plain.loss(swapped).losses)


@given(log_probabilities, log_probabilities)
def test_dpo_starts_at_log_2_wherever_the_reference_is(chosen: list[float], rejected: list[float]) -> None:
    given_ = batch(chosen, rejected)
    same = CompletionBatch(
        given_.logps, given_.owner, given_.sums, given_.lengths, given_.logps, given_.sums, given_.pairs
    )
    result = Dpo(DpoConfig(), None).loss(same)
    torch.testing.assert_close(result.losses, torch.full_like(result.losses, 0.6931472))
    assert not bool(result.logs["margin"].any())


@given(log_probabilities, log_probabilities)
def test_values_of_targets_are_added_up_by_completion(chosen: list[float], rejected: list[float]) -> None:
    pairs = batch(chosen, rejected)
    torch.testing.assert_close(pairs.by_completion(pairs.logps), pairs.sums, rtol=1e-4, atol=1e-5)
    assert [pairs.count(unit) for unit in ("token", "completion", "pair")] == [
        len(pairs.logps), len(pairs.sums), len(pairs.sums) // 2
    ]  # fmt: skip
    losses = CrossEntropy(CrossEntropyConfig(), None).loss(pairs).losses
    torch.testing.assert_close(losses, -pairs.logps)
