"""Requirements on metrics: absolute, and relative to another model."""

from __future__ import annotations

import pytest
from luthier.registry import default_registry
from luthier_plugins.evaluate.config import EvaluateConfig
from pydantic import ValidationError


def config(requirement: str, against: str | list[str] = "base") -> EvaluateConfig:
    values = {"model": "m", "data": "d", "against": against, "require": {"exact_match": requirement}}
    return EvaluateConfig.model_validate(values, context={"components": default_registry()})


@pytest.mark.parametrize(
    ("requirement", "holds"),
    [
        (">= 0.6", True),
        ("> 0.6", False),
        ("< 1e0", True),
        (">= base", True),
        (">= base + 0.05", False),
        (">= base - 0.05", True),
        (">=base+5e-2", False),
        ("<= base + 0.1", True),
    ],
)
def test_a_requirement_holds_or_does_not(requirement: str, holds: bool) -> None:
    facts = {"scores": {"exact_match": 0.6}, "against": [{"scores": {"exact_match": 0.58}}]}
    (gate,) = config(requirement).gates(facts)
    assert gate.ok is holds
    assert gate.value == 0.6


def test_a_stage_whose_name_has_a_dash_is_a_name() -> None:
    facts = {"scores": {"exact_match": 0.6}, "against": [{"scores": {"exact_match": 0.9}}]}
    (gate,) = config(">= my-base - 0.3", "my-base").gates(facts)
    assert gate.ok


@pytest.mark.parametrize("requirement", ["high", ">= ", "== 1", ">= base * 2", ">= 0.5 + 0.1"])
def test_what_is_no_requirement_is_refused(requirement: str) -> None:
    with pytest.raises(ValidationError, match="is not like"):
        config(requirement)


def test_a_comparison_with_a_model_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValidationError, match="compares exact_match with 'other', which is not among `against`"):
        config(">= other")
