"""Objectives against TRL's losses, and against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import CompletionBatch
from luthier_plugins.objectives.config import CpoConfig, CrossEntropyConfig, DpoConfig, OrpoConfig, SimpoConfig
from luthier_plugins.objectives.cpo import Cpo
from luthier_plugins.objectives.cross_entropy import CrossEntropy
from luthier_plugins.objectives.dpo import Dpo
from luthier_plugins.objectives.orpo import Orpo, log_odds
from luthier_plugins.objectives.simpo import Simpo
from pydantic import ValidationError

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


def losses_of_trl(kind: str, policy: tuple[torch.Tensor, torch.Tensor], **settings: float) -> torch.Tensor:
    """TRL's CPO losses, which SimPO is one of."""
    from trl.experimental.cpo import CPOTrainer

    known = {"alpha": 0.0, "simpo_gamma": 0.0, "label_smoothing": 0.0, **settings}
    stand_in = SimpleNamespace(loss_type=kind, accelerator=SimpleNamespace(device="cpu"), **known)
    return CPOTrainer.cpo_loss(stand_in, *policy)[0]


@given(log_probabilities, log_probabilities, st.floats(0.05, 3), st.floats(0, 2))
def test_simpo_is_trl_s(chosen: list[float], rejected: list[float], beta: float, gamma: float) -> None:
    pairs = batch(chosen, rejected)
    means = [sums / lengths for sums, lengths in zip(pairs.sides(pairs.sums), pairs.sides(pairs.lengths), strict=True)]
    theirs = losses_of_trl("simpo", (means[0], means[1]), beta=beta, simpo_gamma=gamma)
    mine = Simpo(SimpoConfig(beta=beta, gamma=gamma), None).loss(pairs).losses
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@given(log_probabilities, log_probabilities, st.floats(0.05, 3), st.floats(0, 0.4), st.floats(0, 2))
def test_cpo_is_trl_s_and_the_chosen_answer_s_own_loss(
    chosen: list[float], rejected: list[float], beta: float, smoothing: float, alpha: float
) -> None:
    pairs = batch(chosen, rejected)
    theirs = losses_of_trl("sigmoid", pairs.sides(pairs.sums), beta=beta, label_smoothing=smoothing)
    own = -pairs.sides(pairs.sums)[0] / pairs.sides(pairs.lengths)[0]
    mine = Cpo(CpoConfig(beta=beta, alpha=alpha, label_smoothing=smoothing), None).loss(pairs).losses
    torch.testing.assert_close(mine, theirs + alpha * own, rtol=1e-5, atol=1e-5)


@given(log_probabilities, log_probabilities, st.floats(0, 2))
def test_a_weighted_sum_is_the_sum_of_its_parts(chosen: list[float], rejected: list[float], weight: float) -> None:
    pairs = batch(chosen, rejected, reference=-5.0)
    parts = [Dpo(DpoConfig(loss=name), None).loss(pairs).losses for name in ("sigmoid", "nll")]  # type: ignore[arg-type]
    both = Dpo(DpoConfig(loss={"sigmoid": 1.0, "nll": weight}), None).loss(pairs)
    torch.testing.assert_close(both.losses, parts[0] + weight * parts[1])
    torch.testing.assert_close(both.logs["loss/nll"], parts[1])
    torch.testing.assert_close(parts[1], -pairs.sides(pairs.sums)[0] / 3)


def test_a_small_alpha_is_the_reverse_divergence() -> None:
    pairs = batch([-3.0, -9.0], [-4.0, -2.0], reference=-5.0)
    usual = Dpo(DpoConfig(), None).loss(pairs).losses
    near = Dpo(DpoConfig(divergence="alpha", divergence_alpha=1e-4), None).loss(pairs).losses
    torch.testing.assert_close(near, usual, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"loss": "nca", "divergence": "js"}, "defined for `divergence: reverse_kl` alone"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "has no `label_smoothing`"),
        ({"loss": {}}, "names none"),
        ({"loss": "sppo", "length_normalized": True}, "it has no lengths"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(config: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DpoConfig(**config)  # type: ignore[arg-type]
