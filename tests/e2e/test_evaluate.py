"""Measuring: scores, slices, gates and their exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from luthier import Recipe, plan, run
from luthier.artifacts.datasets import read_split
from luthier.modeling.loading import load_model, load_tokenizer

RECIPE = """\
luthier: 1
name: measured
seed: 5
stages:
  talks: {uses: data, source: talks.jsonl, keep: [slice], split: test}
  same: {uses: data, source: talks.jsonl}
  base:
    uses: init
    data: [same]
    vocab_size: 300
    hidden_size: 64
    intermediate_size: 128
    layers: 2
    heads: 2
    dtype: float32
  tuned:
    uses: sft
    model: base
    data: same
    steps: 200
    learning_rate: 5e-3
    batch_size: 4
    allow_leakage: it is asked for what it learned by heart
  quality:
    uses: evaluate
    model: tuned
    against: base
    data: talks
    by: slice
    metrics: [exact_match, perplexity]
    max_new_tokens: 8
    require: {exact_match: ">= 0.9", perplexity: "< 2"}
"""


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A recipe that learns four answers by heart and is asked for them."""
    rows = [
        {
            "slice": "even" if n % 2 == 0 else "odd",
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": word}],
        }
        for n, word in enumerate(["yes", "no", "blue", "7"])
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "measured.yaml"
    path.write_text(RECIPE)
    return path


def test_scores_slices_and_gates(measured: Path, tmp_path: Path, cli) -> None:
    result = run(measured, store=tmp_path / ".luthier")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    facts = result.artifact("quality").facts
    assert facts["scores"]["exact_match"] == 1.0
    assert facts["slices"]["odd"]["exact_match"] == 1.0
    assert facts["against"][0]["scores"]["exact_match"] == 0.0
    tuned = result.artifact("tuned")
    tokenizer, model = load_tokenizer(tuned), load_model(tuned)
    total, count = 0.0, 0
    for row in read_split(result.artifact("talks"), "test"):
        user, answer = (message["content"] for message in row["messages"])
        head = tokenizer(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        tail = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        total -= sum(float(logs[len(head) + place - 1, token]) for place, token in enumerate(tail))
        count += len(tail)
    assert facts["scores"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)

    stricter = ("--set", "stages.quality.require.exact_match=> 1")
    told = cli("plan", "measured.yaml", *stricter).stdout
    assert "quality  cached" in told
    done = cli("run", "measured.yaml", *stricter)
    assert done.returncode == 3
    assert "gate exact_match > 1: 1.0 DOES NOT HOLD" in done.stdout


def test_without_against_a_model_is_compared_with_what_it_was_tuned_from(measured: Path) -> None:
    text = measured.read_text()
    more = """\
  again: {uses: sft, model: tuned, data: same, steps: 1, allow_leakage: by heart}
  soup: {uses: merge, models: [again, tuned]}
  late: {uses: evaluate, model: soup, data: talks, require: {exact_match: ">= tuned"}}
  alone: {uses: evaluate, model: soup, data: talks, against: []}
  plain: {uses: evaluate, model: base, data: talks}
  spoken: {uses: merge, models: [base], method: passthrough, chat_template: chatml}
  taught: {uses: sft, model: spoken, data: same, steps: 1, allow_leakage: by heart}
  asked: {uses: evaluate, model: taught, data: talks}
"""
    measured.write_text(text.replace("    against: base\n", "") + more)
    made = {name: stage.config for name, stage in Recipe.load(measured).stages.items()}
    others = {name: made[name].model_dump()["against"] for name in ("quality", "late", "alone", "plain", "asked")}
    assert others == {"quality": ["base"], "late": ["base", "tuned"], "alone": [], "plain": [], "asked": ["spoken"]}
    assert (
        plan(Recipe.load(measured)).nodes["late"].inputs["against"]
        == plan(Recipe.load(measured)).nodes["quality"].inputs["against"]
        + plan(Recipe.load(measured)).nodes["quality"].inputs["model"]
    )


def test_a_requirement_that_does_not_parse_is_refused(measured: Path) -> None:
    with pytest.raises(Exception, match=r"measured.yaml:\d+: stages.quality.require: .*not like '>= 0.8'"):
        plan(Recipe.load(measured, overrides=["stages.quality.require.exact_match=high"]))


@pytest.mark.parametrize("key", ["keep: talks", "require: {exact_match.change: '>= 0'}"])
def test_what_asks_for_another_model_is_refused_before_anything_runs(measured: Path, key: str) -> None:
    name = key.partition(":")[0]
    measured.write_text(measured.read_text() + f"  lonely: {{uses: evaluate, model: base, data: talks, {key}}}\n")
    with pytest.raises(Exception, match=rf"stages.lonely: `{name}` .*name that under `against`"):
        plan(Recipe.load(measured))
