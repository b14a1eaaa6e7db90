"""What the stage `evaluate` says of how sure its numbers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from luthier.api import Artifact, Completion, DataError, Row
from luthier.modeling.generate import TransformersGenerator
from luthier.registry import default_registry
from luthier.reporting.statistics import difference, wilson
from luthier.reporting.tables import certainty
from luthier.testing import run_stage, tiny_dataset, tiny_model

ROWS: list[Row] = [
    {
        "messages": [{"role": "user", "content": f"Is {n} large?"}, {"role": "assistant", "content": "yes"}],
        "about": n // 4,
    }
    for n in range(40)
]


def reported(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    answer: Callable[[int, str], Completion],
    rows: list[Row] = ROWS,
    **config: Any,
) -> Artifact:
    """The report on a model and its base whose answers to each row are known."""
    stages = iter(["tuned", "base"])

    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        name = next(stages)
        for request in requests:
            yield [answer(int(request[-1]["content"].split()[1]), name)]

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    models = {"model": tiny_model(folder), "against": [tiny_model(folder, seed=1)]}
    data = tiny_dataset(folder, rows, split="test")
    return run_stage(folder, "evaluate", config, inputs={**models, "data": data})


def says(right: bool, reason: Any = "stop") -> Completion:
    return Completion("yes" if right else "no", 1, reason)


def test_a_difference_is_told_where_the_interval_leaves_out_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = reported(monkeypatch, tmp_path, lambda n, name: says(n % 8 > 0 if name == "tuned" else n % 2 > 0))
    facts = report.facts
    about = facts["against"][0]["difference"]["exact_match"]
    ours, theirs = [float(n % 8 > 0) for n in range(40)], [float(n % 2 > 0) for n in range(40)]
    right = difference(ours, theirs)
    assert (about["value"], about["p"], about["test"]) == (right.interval.value, right.p, "mcnemar")
    assert about["verdict"] == "better"
    ends = wilson(35, 40)
    assert facts["intervals"]["exact_match"] == [ends.low, ends.high]
    told = "\n".join(certainty(dict(facts), ["tuned", "base"]))
    assert "exact_match: tuned is better than base, +0.375 (95 %: +0.218 to +0.532)" in told
    assert f"exact_match of tuned: {ends.low:.3f} to {ends.high:.3f} (95 %, 40 rows)" in told


def test_a_difference_that_is_noise_is_not_called_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = reported(monkeypatch, tmp_path, lambda n, name: says(n % 3 > 0 if name == "tuned" else n % 5 > 1))
    about = report.facts["against"][0]["difference"]["exact_match"]
    assert about["verdict"] == "not told"
    assert about["needed"] > 40
    told = "\n".join(certainty(dict(report.facts), ["tuned", "base"]))
    assert "tuned cannot be told from base" in told
    assert f"about {about['needed']:,} rows would tell this difference" in told
    assert "better" not in told


def test_what_one_comparison_of_many_shows_by_chance_is_not_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """p is 0.03 for one metric, and far above for three others."""

    def answer(n: int, name: str) -> Completion:
        return Completion("yes" + "." * (n % 2) if name == "tuned" or n >= 6 else "no", 1, "stop")

    exact: dict[str, Any] = {"uses": "exact_match", "ignore_punctuation": True}
    alone = reported(monkeypatch, tmp_path / "1", answer, metrics=[exact]).facts["against"][0]["difference"]
    assert alone["exact_match"]["verdict"] == "better"
    assert alone["exact_match"]["p"] == alone["exact_match"]["corrected"] == pytest.approx(2 / 2**6)

    def noisy(n: int, name: str) -> Completion:
        found = answer(n, name)
        flips = n in (20, 21, 22) if name == "tuned" else n in (23, 24)
        return Completion(f"{found.text}{'!?' if flips else ''}", 1, "stop")

    odd = [{"uses": "regex", "pattern": r"\?", "name": f"r{n}"} for n in range(3)]
    among = reported(monkeypatch, tmp_path / "2", noisy, metrics=[exact, *odd]).facts["against"][0]["difference"]
    assert among["exact_match"]["p"] == alone["exact_match"]["p"]
    assert among["exact_match"]["corrected"] == pytest.approx(4 * 2 / 2**6)
    assert among["exact_match"]["low"] > 0
    assert among["exact_match"]["verdict"] == "not told"


def test_rows_of_one_text_are_not_counted_as_independent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(n: int, name: str) -> Completion:
        return says((n // 4) % 3 > 0 if name == "tuned" else (n // 4) % 5 > 2)

    widths = []
    for clusters in (None, "about"):
        report = reported(monkeypatch, tmp_path / str(clusters), answer, clusters=clusters)
        low, high = report.facts["intervals"]["exact_match"]
        widths.append(high - low)
        test = report.facts["against"][0]["difference"]["exact_match"]["test"]
        assert test == ("t" if clusters else "mcnemar")
    assert widths[1] > 1.6 * widths[0]


def test_all_wrong_is_not_certain_and_the_same_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for clusters, count in ((None, 40), ("about", 10)):
        report = reported(monkeypatch, tmp_path, lambda n, name: says(False), clusters=clusters)
        ends = wilson(0, count)
        assert report.facts["intervals"]["exact_match"] == [ends.low, ends.high]
        assert "exact_match: tuned and base are the same on every row" in certainty(
            dict(report.facts), ["tuned", "base"]
        )


def test_what_corrupts_a_table_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(n: int, name: str) -> Completion:
        if n < 3:
            return Completion("no number", 9, "length")
        return Completion("" if n < 5 else "<think>so</think> " if n < 6 else "yes", 1, "stop")

    report = reported(
        monkeypatch, tmp_path, answer, metrics=["exact_match", {"uses": "json_schema", "json_schema": {}}]
    )
    assert report.facts["answers"] == {"given": 40, "cut off": 3, "empty": 3}
    assert report.facts["unread"] == {"json_schema": 40}
    told = certainty(dict(report.facts), ["tuned", "base"])
    assert "tuned: of 40 answers 3 cut off, 3 empty, 40 that json_schema could not read" in told


def test_a_metric_that_is_no_mean_has_no_interval_and_a_perplexity_has_its_own(tmp_path: Path) -> None:
    model, other = tiny_model(tmp_path), tiny_model(tmp_path, seed=1)
    data = tiny_dataset(tmp_path, ROWS, split="test")
    config = {"metrics": ["perplexity", {"uses": "perplexity", "per": "byte", "name": "by-byte"}, "bleu"],
              "max_new_tokens": 4}  # fmt: skip
    report = run_stage(tmp_path, "evaluate", config, inputs={"model": model, "against": [other], "data": data})
    intervals, scores = report.facts["intervals"], report.facts["scores"]
    assert intervals.keys() >= {"perplexity", "by-byte"}
    for name in ("perplexity", "by-byte"):
        low, high = intervals[name]
        assert low < scores[name] < high
    assert report.facts["against"][0]["difference"].keys() >= {"perplexity", "by-byte"}


def test_a_metric_that_is_no_mean_has_an_interval_by_bootstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """BLEU of 40 answers of four words, of which every third is wrong."""
    right = "it is quite so"
    rows: list[Row] = [
        {"messages": [{"role": "user", "content": f"Is {n} large?"}, {"role": "assistant", "content": right}]}
        for n in range(40)
    ]

    def answer(n: int, name: str) -> Completion:
        good = n % 3 > 0 if name == "tuned" else n % 3 > 1
        return Completion(right if good else "it may be otherwise here", 4, "stop")

    facts = reported(monkeypatch, tmp_path, answer, rows=rows, metrics=["bleu"]).facts
    said = [right if n % 3 > 0 else "it may be otherwise here" for n in range(40)]
    assert facts["scores"]["bleu"] == sacrebleu.corpus_bleu(said, [[right] * 40]).score
    low, high = facts["intervals"]["bleu"]
    theirs = sacrebleu.BLEU().corpus_score(said, [[right] * 40], n_bootstrap=1000)
    # sacrebleu gives the middle of its own draws and half their width.
    assert high - low == pytest.approx(2 * theirs._ci, rel=0.15)
    about = facts["against"][0]["difference"]["bleu"]
    other = [right if n % 3 > 1 else "it may be otherwise here" for n in range(40)]
    assert about["value"] == pytest.approx(facts["scores"]["bleu"] - sacrebleu.corpus_bleu(other, [[right] * 40]).score)
    assert (about["test"], about["verdict"]) == ("bootstrap", "better")
    assert about["low"] > 0
    assert about["p"] < 0.01


def gates(require: dict[str, str], facts: dict[str, Any], **config: Any) -> list[tuple[str, bool, Any]]:
    uses = {"uses": "evaluate", "model": "m", "data": "d", "against": ["base"], "require": require, **config}
    made: Any = default_registry().use("stage", uses).config
    return [(gate.metric, gate.ok, gate.value) for gate in made.gates(facts)]


def test_gates_on_ends_of_intervals_and_on_changes() -> None:
    facts = {
        "scores": {"exact_match": 0.9, "perplexity": 5.2},
        "intervals": {"exact_match": [0.84, 0.94]},
        "against": [{"scores": {"exact_match": 0.8, "perplexity": 5.0}}],
    }
    metrics = {"metrics": ["exact_match", "perplexity"]}
    require = {
        "exact_match.lower": ">= base",
        "exact_match.upper": "< 0.94",
        "perplexity.change": "<= 0.05",
        "exact_match.change": ">= 0.2",
        "perplexity.lower": ">= 1",
    }
    assert gates(require, facts, **metrics) == [
        ("exact_match.lower", True, 0.84),
        ("exact_match.upper", False, 0.94),
        ("perplexity.change", True, pytest.approx(0.04)),
        ("exact_match.change", False, pytest.approx(0.125)),
        # What was not measured does not hold.
        ("perplexity.lower", False, None),
    ]
    with pytest.raises(ValueError, match=r"`require` names f1\.lower, which is not among `metrics`"):
        gates({"f1.lower": "> 0"}, facts)
    with pytest.raises(ValueError, match="a share, with another model's value"):
        gates({"exact_match.change": "<= base"}, facts)
    # Nothing to change from: refused before anything runs.
    uses = {"uses": "evaluate", "model": "m", "data": "d", "against": [], "require": {"exact_match.change": "> 0"}}
    alone: Any = default_registry().use("stage", uses).config
    assert alone.kind_problems({"model": ["model"]}) == [
        "`require` names exact_match.change, the change from another model: name that under `against`"
    ]


def test_a_column_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data has no column 'text'"):
        reported(monkeypatch, tmp_path, lambda n, name: says(True), clusters="text")


def test_no_model_is_asked_the_same_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second stage, with another metric, asks for nothing; one with longer answers does."""
    asked: list[int] = []

    def answer(n: int, name: str) -> Completion:
        asked.append(n)
        return says(n % 2 > 0)

    first = reported(monkeypatch, tmp_path, answer)
    assert len(asked) == 80
    second = reported(monkeypatch, tmp_path, answer, metrics=["exact_match", "f1"])
    assert len(asked) == 80
    assert second.facts["scores"]["exact_match"] == first.facts["scores"]["exact_match"] == 0.5
    reported(monkeypatch, tmp_path, answer, max_new_tokens=9)
    assert len(asked) == 160


def test_reports_of_other_stages_have_nothing_of_the_kind() -> None:
    assert certainty({"table": {"columns": [], "rows": []}, "whole": 1.0}, ["a", "b"]) == []
