"""Searching for the weights of a merge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gguf_models import make_model
from luthier import Recipe, run
from luthier.api import Interrupted, ModelError, RecipeError
from luthier.artifacts.datasets import read_split
from luthier.merging.files import Files
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.samples import samples_of
from luthier.modeling.scoring import scored
from luthier.testing import run_stage, tiny_dataset
from luthier_plugins.merge.search import stage as searching
from luthier_plugins.metrics.config import PerplexityConfig
from luthier_plugins.metrics.perplexity import Perplexity

RECIPE = """\
luthier: 1
name: searched
seed: 3
stages:
  chats: {uses: data, source: chats.jsonl, split: {validation: 0.3}}
  blank: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  good: {uses: sft, model: blank, data: chats, steps: 60, learning_rate: 5e-3}
  bad: {uses: sft, model: blank, data: chats, steps: 1, learning_rate: 1e-5}
  best:
    uses: search
    models: [bad, good]
    data: chats
    trials: 14
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a search was run."""
    place = tmp_path_factory.mktemp("searched")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(30)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "searched.yaml").write_text(RECIPE)
    return place


def test_the_search_finds_the_better_model_and_stores_what_it_measured(folder: Path) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    best = result.artifact("best")
    found = best.facts["search"]
    assert len(found["curve"]) == 14
    assert found["best"]["score"] == min(found["curve"]) < found["curve"][0], "better than equal weights"
    assert found["best"]["values"]["weight 1"] > found["best"]["values"]["weight 0"]
    bad, good = found["against"]
    assert bad["beyond_noise"]
    assert good["score"] < bad["score"]
    # What is in the store is what was measured.
    rows = read_split(result.artifact("chats"), "validation")
    metric = Perplexity(PerplexityConfig(), None)
    stops = best.facts["stop_token_ids"]
    made = scored(load_model(best), ChatEncoder(load_tokenizer(best), stops), rows, [metric.needs], folder)
    score = metric.score(samples_of(rows, metric.needs, {}, made), None)
    assert score.value == pytest.approx(found["best"]["score"], rel=1e-4)


def test_a_stopped_search_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    inputs = {"models": [result.artifact("bad"), result.artifact("good")], "data": result.artifact("chats")}
    config = {"trials": 9, "method": {"uses": "slerp"}, "over": {"t": [0.0, 1.0]}}
    whole = run_stage(folder / "whole", "search", config, inputs=inputs, seed=3)
    count = 0
    merge = searching._Judge.merge

    def stopping(self, values) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise Interrupted("stop")
        merge(self, values)

    monkeypatch.setattr(searching._Judge, "merge", stopping)
    with pytest.raises(Interrupted):
        run_stage(folder / "parts", "search", config, inputs=inputs, seed=3)
    done = 0

    def counting(self, values) -> None:
        nonlocal done
        done += 1
        merge(self, values)

    monkeypatch.setattr(searching._Judge, "merge", counting)
    (work,) = (folder / "parts" / "work").iterdir()
    assert len((work / "trials.jsonl").read_text().splitlines()) == 4
    resumed = run_stage(folder / "parts", "search", config, inputs=inputs, seed=3)
    assert resumed.facts["search"] == whole.facts["search"]
    assert done == 9 - 4 + 1, "the trials that were left, and the best one again"
    assert 0 <= resumed.facts["search"]["best"]["values"]["t"] <= 1


def test_a_trial_reads_no_file_where_the_models_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    inputs = {"models": [result.artifact("bad"), result.artifact("good")], "data": result.artifact("chats")}
    reads: list[str] = []
    during: list[int] = []
    raw, merge = Files.raw, searching._Judge.merge
    monkeypatch.setattr(Files, "raw", lambda self, name, *rest: (reads.append(name), raw(self, name, *rest))[1])

    def watched(self, values) -> None:
        before = len(reads)
        merge(self, values)
        during.append(len(reads) - before)

    monkeypatch.setattr(searching._Judge, "merge", watched)
    held = run_stage(folder / "held", "search", {"trials": 3}, inputs=inputs, seed=3)
    assert during == [0] * 4
    monkeypatch.setattr("luthier_plugins.merge.search.memory.SHARE", 0.0)
    during.clear()
    read = run_stage(folder / "read", "search", {"trials": 3}, inputs=inputs, seed=3)
    assert all(during)
    assert read.facts["search"] == held.facts["search"]


def test_what_a_method_learns_from_data_counts_in_every_trial(folder: Path) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    inputs = {
        "models": [result.artifact("bad"), result.artifact("good")],
        "data": result.artifact("chats"),
        "method.data": result.artifact("chats"),
    }
    scores = {}
    for name in ("fisher", "linear"):
        given = inputs if name == "fisher" else {key: value for key, value in inputs.items() if key != "method.data"}
        method = {"uses": name, "data": "d", "rows": 4} if name == "fisher" else name
        found = run_stage(folder / "learned", "search", {"method": method, "trials": 1}, inputs=given, seed=3)
        scores[name] = found.facts["search"]["best"]["score"]
    assert scores["fisher"] != scores["linear"]


def test_experts_are_refused_before_anything_is_tried(tmp_path: Path) -> None:
    store = tmp_path / "s"
    mixed = run_stage(store, "base", {"source": str(make_model(tmp_path / "m", "mixtral"))})
    rows = [{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "no"}]}] * 4
    inputs = {"models": [mixed, mixed], "data": tiny_dataset(store, rows, split="validation")}
    with pytest.raises(ModelError, match="in a different form than the file"):
        run_stage(store, "search", {"trials": 50}, inputs=inputs)


def test_a_merge_that_does_not_compute_is_no_best_merge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    inputs = {"models": [result.artifact("bad"), result.artifact("good")], "data": result.artifact("chats")}
    scores = [math.nan, 7.0, math.inf, 5.0]
    measured = searching._Judge.score
    monkeypatch.setattr(searching._Judge, "score", lambda self: scores.pop(0) if scores else measured(self))
    found = run_stage(folder / "broken", "search", {"trials": 4}, inputs=inputs, seed=3).facts["search"]
    assert found["curve"] == [None, 7.0, None, 5.0]
    assert found["best"]["score"] == 5.0


def test_scales_beyond_numbers_are_reported_and_no_crash(folder: Path) -> None:
    result = run(folder / "searched.yaml", store=folder / "s")
    inputs = {
        "models": [result.artifact("bad"), result.artifact("good")],
        "data": result.artifact("chats"),
        "base": result.artifact("blank"),
    }
    method = {"method": "task_arithmetic", "weights": None, "trials": 3}
    # Losses so large that their exponential is no longer a number.
    large = run_stage(folder / "l", "search", {**method, "over": {"scale": [1e5, 1e6]}}, inputs=inputs).facts["search"]
    assert all(score is not None and math.isfinite(score) for score in large["curve"])
    assert not any(item["beyond_noise"] for item in large["against"])
    with pytest.raises(ModelError, match="none of 3 merges has a score"):
        run_stage(folder / "n", "search", {**method, "over": {"scale": [1e42, 1e43]}}, inputs=inputs)


@pytest.mark.parametrize("rows", [3, 8, 60])
def test_the_best_of_many_equal_merges_is_seldom_called_better(rows: int) -> None:
    random = np.random.default_rng(0)
    called = 0
    for _ in range(200):
        tokens = random.integers(1, 40, rows)
        other = [(float(-loss), float(count)) for loss, count in zip(random.gamma(2, tokens), tokens, strict=True)]
        tried = [[(sum_ + float(random.normal(0, 3)), count) for sum_, count in other] for _ in range(30)]
        best = max(tried, key=lambda trial: sum(row[0] for row in trial))
        called += searching.compared(best, other, 30)["beyond_noise"]
    assert called <= 10, "at a level of 0.025, 5 of 200"


def test_the_difference_is_that_of_the_log_perplexities() -> None:
    best, other = [(-10.0, 5.0), (-2.0, 1.0), (-30.0, 10.0)], [(-11.0, 5.0), (-4.0, 1.0), (-36.0, 10.0)]
    found = searching.compared(best, other, 1)
    assert found["difference"] == pytest.approx(51 / 16 - 42 / 16)
    # The sum of squared residuals of the ratio, by hand: differences 1, 2, 6 for 5, 1, 10 tokens.
    ratio = 9 / 16
    spread = ((1 - 5 * ratio) ** 2 + (2 - ratio) ** 2 + (6 - 10 * ratio) ** 2) * 3 / 2
    assert found["standard_error"] == pytest.approx(math.sqrt(spread) / 16)
    assert searching.compared(best[:1], other[:1], 1)["beyond_noise"] is False
    # Rows without a value for one of the two are left out; without any other, nothing can be said.
    nothing = (0.0, 0.0)
    assert searching.compared([*best, nothing], [*other, other[0]], 1) == found
    assert searching.compared([nothing], other[:1], 1)["difference"] is None
    # Right where the other is wrong, on every row: two rows could be luck, twenty are none.
    right, wrong = [(1.0, 1.0)], [(0.0, 1.0)]
    assert searching.compared(right * 2, wrong * 2, 60)["beyond_noise"] is False
    assert searching.compared(right * 20, wrong * 20, 60)["beyond_noise"] is True
    assert searching.compared(right * 20, right * 20, 60)["beyond_noise"] is False


def test_the_order_of_the_ranges_is_no_matter_of_the_result() -> None:
    stage = {"uses": "search", "models": ["./a", "./b"], "base": "./c", "data": "./d.jsonl", "method": "ties"}
    ranges = {"density": [0.2, 1.0], "scale": [0.5, 1.5]}
    points = []
    for names in (["density", "scale"], ["scale", "density"]):
        over = {name: ranges[name] for name in names}
        recipe = Recipe.from_mapping({"luthier": 1, "stages": {"x": {**stage, "over": over}}})
        points.append(recipe.stages["x"].config.bounds)
    assert points[0] == points[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "slerp"}, "nothing to search for"),
        ({"method": "slerp", "weights": [0, 1]}, "slerp does not use weights"),
        ({"method": "ties"}, "ties merges task vectors"),
        ({"over": {"density": [0, 1]}}, "linear has no parameter 'density'"),
        ({"method": "ties", "base": "c", "over": {"density": [0.5, 2]}}, "2 is not between 0 and 1"),
        ({"weights": [1, 0]}, "the smaller number comes first"),
        ({"weights": [-1, 1]}, "begin at 0"),
        ({"method": "karcher", "over": {"steps": [1, 20]}}, "not a number that can be searched"),
    ],
)
def test_searches_that_cannot_be_are_refused_before_anything_runs(values: dict, message: str) -> None:
    stage = {"uses": "search", "models": ["./a", "./b"], "data": "./d.jsonl", **values}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping({"luthier": 1, "stages": {"x": stage}})
    assert message in str(caught.value)
