"""A recipe that trains on what it tests on is stopped before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
luthier: 1
name: leaky
stages:
  base: {uses: base, source: "embedded:nano-base"}
  pairs: {uses: data, source: pairs.jsonl}
  held: {uses: data, source: held.jsonl, split: test}
  tuned: {uses: dpo, model: base, data: pairs, steps: 1, batch_size: 2, learning_rate: 1e-4}
  quality: {uses: evaluate, model: tuned, data: held, max_new_tokens: 4}
"""


def asked(number: int) -> str:
    return f"Anna has {number} apples and gives {number // 2} of them to her brother. How many apples are left for her?"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Tunes on pairs of which three have the questions of the test."""
    write(
        tmp_path / "pairs.jsonl", [{"prompt": asked(n), "chosen": str(n), "rejected": "no"} for n in range(10, 22, 2)]
    )
    write(tmp_path / "held.jsonl", [{"prompt": asked(n), "completion": str(n)} for n in range(16, 28, 2)])
    path = tmp_path / "leaky.yaml"
    path.write_text(RECIPE)
    return path


def test_training_on_the_test_is_refused_with_the_rows_side_by_side(leaky: Path, cli: Callable[..., Any]) -> None:
    done = cli("run", str(leaky))
    assert done.returncode == 1
    assert "3 of the 6 rows that 'quality' tests on are trained on" in done.stderr
    assert "held.jsonl:1: Anna has 16 apples" in done.stderr
    assert "pairs.jsonl:4: Anna has 16 apples" in done.stderr
    assert 'allow_leakage: "why"' in done.stderr
    assert "loaded" not in done.stderr
    # Though only the training is asked for.
    assert cli("run", str(leaky), "--only", "tuned").returncode == 1


def test_a_reason_lets_it_be_and_is_in_the_manifest(leaky: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    leaky.write_text(RECIPE.replace("learning_rate: 1e-4", 'learning_rate: 1e-4, allow_leakage: "it is a drill"'))
    done = cli("run", str(leaky))
    assert done.returncode == 0, done.stderr
    assert "allowed: it is a drill" in done.stderr
    manifests = [json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")]
    (tuned,) = [item for item in manifests if item["stage"] == "tuned"]
    assert tuned["config"]["allow_leakage"] == "it is a drill"
    assert any("3 of the 6 rows" in text for text in tuned["warnings"])


def test_what_was_trained_before_is_not_tested_on_what_it_knows(
    leaky: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    without, _, quality = RECIPE.partition("  quality:")
    leaky.write_text(without)
    assert cli("run", str(leaky)).returncode == 0
    leaky.write_text(RECIPE)
    done = cli("run", str(leaky))
    assert done.returncode == 1
    assert "3 of the 6 rows that 'quality' tests on are trained on" in done.stderr
    leaky.write_text(f'{without}  quality:{quality.rstrip()[:-1]}, allow_leakage: "to see what it kept"}}\n')
    assert cli("run", str(leaky)).returncode == 0


def test_other_rows_are_trained_and_tested(leaky: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    write(
        tmp_path / "held.jsonl", [{"prompt": f"What is the colour of number {n}?", "completion": "a"} for n in range(5)]
    )
    done = cli("run", str(leaky))
    assert done.returncode == 0, done.stderr
    assert "trained on" not in done.stderr
