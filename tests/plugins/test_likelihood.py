"""Metrics of a model's probabilities, and what the stage `evaluate` makes of general data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from luthier.api import Artifact, Conversation, DataError, Needs, Row
from luthier.api.evaluation import Choices
from luthier.artifacts.rows import prompt_of
from luthier.modeling import scoring
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.scoring import chosen, scored
from luthier.modeling.text import IGNORED, Encoded
from luthier.reporting.tables import certainty
from luthier.testing import run_stage, tiny_dataset, tiny_model
from scipy.special import rel_entr

OFFERED = ["yes", "no", "maybe a longer one"]
ROWS: list[Row] = [
    {
        "messages": [
            {"role": "user", "content": "Is " + "so " * (n % 5) + f"{n} large?"},
            {"role": "assistant", "content": OFFERED[n % 3]},
        ],
        "choices": OFFERED,
    }
    for n in range(12)
]


def encoder_of(artifact: Artifact) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(artifact), artifact.facts["stop_token_ids"], None)


def alone(model: Any, encoder: ChatEncoder, row: Row, answer: str) -> tuple[list[float], list[int], np.ndarray]:
    """log p of an answer's tokens, the likeliest ones in their places, and the distributions, of one pass."""
    talk = [*prompt_of(row), {"role": "assistant", "content": answer}]
    (item,) = encoder.conversation(talk, "last")  # type: ignore[arg-type]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([item.input_ids])).logits[0].double().log_softmax(-1)
    places = [place for place, label in enumerate(item.labels) if label != IGNORED]
    wide = logs[[place - 1 for place in places]]
    own = [float(logs[place - 1, item.labels[place]]) for place in places]
    return own, wide.argmax(1).tolist(), wide.numpy()


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_rows_scored_together_are_what_they_are_alone(
    tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS", tokens)
    artifact = tiny_model(tmp_path)
    model, encoder = load_model(artifact), encoder_of(artifact)
    choices = Choices()
    needs = [Needs(distributions=True), Needs(choices=choices)]
    for row, found in zip(ROWS, scored(model, encoder, ROWS, needs, tmp_path / "wide"), strict=True):
        own, likeliest, wide = alone(model, encoder, row, row["messages"][-1]["content"])
        assert found.logps == pytest.approx(own, abs=1e-4)
        assert list(found.likeliest) == likeliest
        assert found.distribution is not None
        np.testing.assert_allclose(found.distribution(), wide, atol=1e-4)
        assert [item.text for item in found.choices[choices]] == OFFERED
        for item in found.choices[choices]:
            assert item.logps == pytest.approx(alone(model, encoder, row, item.text)[0], abs=1e-4)
    assert scored(model, encoder, ROWS, [Needs()], tmp_path) == []


def test_metrics_are_what_a_plain_loop_says(tmp_path: Path) -> None:
    ours, theirs = tiny_model(tmp_path), tiny_model(tmp_path, seed=1)
    data = tiny_dataset(tmp_path, ROWS, split="test")
    metrics = [
        "token_accuracy",
        "agreement",
        "kl",
        "multiple_choice",
        {"uses": "multiple_choice", "name": "fair", "normalize": "byte"},
        {"uses": "multiple_choice", "name": "by-token", "normalize": "token"},
        {"uses": "multiple_choice", "name": "fixed", "choices": [*OFFERED, "never"]},
    ]
    report = run_stage(
        tmp_path, "evaluate", {"metrics": metrics}, inputs={"model": ours, "against": [theirs], "data": data}
    ).facts
    encoder, models = encoder_of(ours), [load_model(ours), load_model(theirs)]
    hits = same = count = 0
    apart = 0.0
    chosen = {"multiple_choice": 0, "fair": 0, "by-token": 0}
    for row in ROWS:
        answer = row["messages"][-1]["content"]
        (_, mine, q), (_, other, p) = (alone(model, encoder, row, answer) for model in models)
        (item,) = encoder.conversation(row["messages"], "last")
        targets = [label for label in item.labels if label != IGNORED]
        hits += sum(map(int.__eq__, mine, targets))
        same += sum(map(int.__eq__, mine, other))
        count += len(targets)
        apart += float(rel_entr(np.exp(p), np.exp(q)).sum())
        sums = {text: alone(models[0], encoder, row, text)[0] for text in OFFERED}
        sizes = {"multiple_choice": lambda text: 1, "fair": len, "by-token": lambda text: len(sums[text])}  # noqa: B023
        for name, size in sizes.items():
            best = max(OFFERED, key=lambda text: sum(sums[text]) / size(text))
            chosen[name] += best == answer
    assert report["scores"]["token_accuracy"] == pytest.approx(hits / count)
    assert report["scores"]["agreement"] == pytest.approx(same / count)
    assert report["scores"]["kl"] == pytest.approx(apart / count, rel=1e-4)
    for name, right in chosen.items():
        assert report["scores"][name] == pytest.approx(right / len(ROWS))
    base = report["against"][0]["scores"]
    assert (base["agreement"], base["kl"]) == (1.0, pytest.approx(0, abs=1e-9))
    # Whether it is a share of rows or of tokens, it has an interval.
    assert report["intervals"].keys() >= {"token_accuracy", "agreement", "multiple_choice"}
    assert report["prompt"] == "<|im_start|>user\nIs 0 large?<|im_end|>\n<|im_start|>assistant\n"


def test_choices_that_are_none_and_tokenizers_that_differ_are_told(tmp_path: Path) -> None:
    ours = tiny_model(tmp_path)
    inputs: dict[str, Any] = {"model": ours, "data": tiny_dataset(tmp_path, ROWS, split="test")}
    with pytest.raises(DataError, match="none of the answers to choose among"):
        run_stage(
            tmp_path, "evaluate", {"metrics": [{"uses": "multiple_choice", "choices": ["a", "b"]}]}, inputs=inputs
        )
    with pytest.raises(DataError, match="no list of two texts or more in the column 'options'"):
        run_stage(tmp_path, "evaluate", {"metrics": [{"uses": "multiple_choice", "column": "options"}]}, inputs=inputs)
    other = tiny_model(tmp_path, texts=["Is that so large? No."], vocab_size=300)
    for metric in ("agreement", "kl"):
        with pytest.raises(DataError, match="their tokenizers or chat templates differ"):
            run_stage(tmp_path, "evaluate", {"metrics": [metric]}, inputs={**inputs, "against": [other]})
    with pytest.raises(DataError, match="compares with another model"):
        run_stage(tmp_path, "evaluate", {"metrics": ["kl"]}, inputs=inputs)


def test_general_data_shows_what_was_forgotten(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    target = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "blue"}], "topic": "blue"}
        for n in range(8)
    ]
    data = tiny_dataset(tmp_path, target)
    tuned = run_stage(tmp_path, "sft", {"steps": 30, "learning_rate": 3e-3}, inputs={"model": base, "data": [data]})
    inputs: dict[str, Any] = {
        "model": tuned,
        "against": [base],
        "data": tiny_dataset(tmp_path, target, split="test"),
        "keep": tiny_dataset(tmp_path, ROWS, split="test"),
    }
    config = {"metrics": ["perplexity"], "by": "topic", "max_new_tokens": 4}
    report = run_stage(tmp_path, "evaluate", config, inputs=inputs)
    facts = report.facts
    assert list(facts).index("scores") < list(facts).index("rows_by_metric"), "a metric's first number is its value"
    assert facts["rows_by_metric"] == {"perplexity": 8, "keep.perplexity": 12, "keep.agreement": 12}
    assert facts["slices"] == {"blue": {"perplexity": facts["scores"]["perplexity"]}}
    before = facts["against"][0]["scores"]
    assert facts["scores"]["perplexity"] < before["perplexity"], "the target gained"
    alone = run_stage(
        tmp_path,
        "evaluate",
        {"metrics": ["perplexity", "agreement"]},
        inputs={**{name: inputs[name] for name in ("model", "against")}, "data": inputs["keep"]},
    )
    assert facts["scores"]["keep.perplexity"] == pytest.approx(alone.facts["scores"]["perplexity"])
    assert facts["scores"]["keep.agreement"] == alone.facts["scores"]["agreement"] < 1
    # What compares with the other model is nothing to compare that model by.
    difference = facts["against"][0]["difference"]
    assert difference.keys() == {"perplexity", "keep.perplexity"}
    assert difference["keep.perplexity"]["rows"] == 12
    lines = (report.path / "keep-model.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert len((report.path / "model.jsonl").read_text().splitlines()) == 8
    assert any(
        "keep.perplexity of tuned: " in line and "12 rows" in line for line in certainty(facts, ["tuned", "base"])
    )
    assert math.isfinite(facts["scores"]["keep.perplexity"])


@pytest.mark.parametrize("offered", [["a", ""], ["a", " "], [], ["a"], "ab", [1, 2], None])
def test_a_row_with_nothing_to_choose_among_is_a_bad_row(tmp_path: Path, offered: Any) -> None:
    rows: list[Row] = [dict(ROWS[0], choices=offered), *ROWS[1:]]
    inputs: dict[str, Any] = {"model": tiny_model(tmp_path), "data": tiny_dataset(tmp_path, rows, split="test")}
    config: dict[str, Any] = {"metrics": ["multiple_choice"]}
    with pytest.raises(DataError, match="row 1, init: a row has no list of two texts or more"):
        run_stage(tmp_path, "evaluate", config, inputs=inputs)
    report = run_stage(tmp_path, "evaluate", {**config, "bad_rows": {"drop_up_to": 0.2}}, inputs=inputs)
    lines = [json.loads(line) for line in (report.path / "model.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(2, 13)), "numbered as in the split"


def test_choices_are_told_with_the_rows_tools() -> None:
    class Heard:
        def conversation(self, talk: Conversation, answers: str) -> list[Encoded]:
            return [Encoded([len(talk)], [len(talk.tools)])]

    tool = {"type": "function", "function": {"name": "warm"}}
    found = chosen(Heard(), {**ROWS[0], "tools": [tool]}, "no")  # type: ignore[arg-type]
    assert (found.input_ids, found.labels) == ([2], [1])
