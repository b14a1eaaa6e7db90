"""Preference losses against TRL's, and against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import PreferenceBatch
from luthier_plugins.preference_losses.config import OrpoLossConfig, SigmoidConfig
from luthier_plugins.preference_losses.orpo import Orpo, log_odds
from luthier_plugins.preference_losses.sigmoid import Sigmoid

log_probabilities = st.lists(st.floats(-60, -0.01), min_size=2, max_size=6)


def batch(chosen: list[float], rejected: list[float], tokens: int = 3) -> PreferenceBatch:
    count = min(len(chosen), len(rejected))
    lengths = torch.full((count,), tokens)
    sides = torch.tensor(chosen[:count]), torch.tensor(rejected[:count])
    return PreferenceBatch(*sides, None, None, lengths, lengths + 2)


@given(log_probabilities, log_probabilities, st.floats(0.01, 2))
def test_orpo_is_the_nll_and_trl_s_odds_ratio(chosen: list[float], rejected: list[float], beta: float) -> None:
    from trl.experimental.orpo import ORPOTrainer

    pairs = batch(chosen, rejected)
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    stand_in = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(stand_in, *means)[0]
    torch.testing.assert_close(Orpo(OrpoLossConfig()).loss(pairs, beta), -means[0] - theirs, rtol=1e-4, atol=1e-5)


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
def test_a_smoothed_sigmoid_weighs_both_orders(chosen: list[float], rejected: list[float], beta: float) -> None:
    pairs = batch(chosen, rejected)
    zeros = torch.zeros_like(pairs.chosen)
    known = PreferenceBatch(pairs.chosen, pairs.rejected, zeros, zeros, pairs.chosen_tokens, pairs.rejected_tokens)
    swapped = PreferenceBatch(pairs.rejected, pairs.chosen, zeros, zeros, pairs.rejected_tokens, pairs.chosen_tokens)
    plain = Sigmoid(SigmoidConfig())
    smooth = Sigmoid(SigmoidConfig(label_smoothing=0.2)).loss(known, beta)
    torch.testing.assert_close(smooth, 0.8 * plain.loss(known, beta) + 0.2 * plain.loss(swapped, beta))
