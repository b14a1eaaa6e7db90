"""A loss that runs away: it is noticed, the batch is named, and the checkpoint before it is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Artifact, ModelError
from luthier.artifacts.checkpoints import checkpoints, step_of
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.training import run
from luthier.training.divergence import FIRST, LAST, Watch

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!" * (n + 1)}]}
    for n in range(8)
]


def followed(losses: list[float]) -> Watch:
    watch = Watch()
    for loss in losses:
        watch.add(loss)
    return watch


@given(st.floats(0.01, 20), st.lists(st.floats(0, 1), min_size=30, max_size=60))
def test_losses_that_fall_or_stay_have_not_run_away(begin: float, shares: list[float]) -> None:
    watch = followed([begin] * FIRST)
    for share in shares:
        watch.add(begin * share)
        assert not watch.diverged
        assert not watch.spiking


@given(st.floats(0.3, 20), st.floats(2.1, 50))
def test_losses_that_stay_high_have_and_one_alone_has_not(begin: float, times: float) -> None:
    high = max(begin * times, begin + 0.6)
    watch = followed([begin] * (FIRST + LAST))
    watch.add(min(high, 5 * begin + 0.6))
    assert watch.spiking
    for _ in range(LAST):
        watch.add(high)
    assert watch.diverged
    # A stage that is resumed knows what the first steps were like.
    again = Watch(watch.began)
    again.add(high)
    assert again.spiking


def test_no_number_is_bad_at_any_time() -> None:
    assert Watch().bad(math.nan)
    assert Watch().bad(math.inf)


def tuned(folder: Path, model: Artifact, **config: Any) -> Artifact:
    inputs = {"model": model, "data": [tiny_dataset(folder, CHATS)]}
    settings = {"steps": 60, "batch_size": 4, "learning_rate": 1e-5, "log_every": 1, "save_every": 4, **config}
    return run_stage(folder, "sft", settings, inputs=inputs)


@pytest.fixture
def learned(tmp_path: Path) -> Artifact:
    """A model whose loss is small."""
    model = tuned(tmp_path, tiny_model(tmp_path), learning_rate=1e-2, steps=80, save_every=100)
    assert model.facts["training"]["loss_last"] < 0.5
    return model


@pytest.fixture
def thrown_off(learned: Artifact, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """After 21 steps something throws the weights off."""
    inner = run.Passes.step
    steps: list[int] = []

    def step(self: Any, rows: Any, backward: Any) -> Any:
        steps.append(1)
        if len(steps) == 22:
            for name, parameter in self.model.named_parameters():
                if "down_proj" in name or "o_proj" in name:
                    parameter.data.mul_(-1)
        return inner(self, rows, backward)

    monkeypatch.setattr(run.Passes, "step", step)
    return learned


def test_a_loss_that_runs_away_stops_the_stage(tmp_path: Path, thrown_off: Artifact) -> None:
    with pytest.raises(
        ModelError, match=r"has run away: \d.* it began at step 22, where the loss of a row is"
    ) as caught:
        tuned(tmp_path, thrown_off)
    assert "assistant" in str(caught.value)
    assert "on_divergence: warn" in str(caught.value.hint)
    # None was written after it.
    whole, _ = checkpoints(tmp_path)
    assert [step_of(path) for path in whole] == [20]


def test_or_is_only_told(tmp_path: Path, thrown_off: Artifact) -> None:
    made = tuned(tmp_path, thrown_off, on_divergence="warn")
    assert made.facts["training"]["steps"] == 60
    assert sum("has run away" in text for text in made.manifest["warnings"]) == 1
