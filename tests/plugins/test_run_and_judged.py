"""Metrics that run something for each answer: code, mathematics, several draws, a judge."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Artifact, Completion, DataError, LuthierError, Row, Sample, Score
from luthier.modeling.generate import TransformersGenerator
from luthier.registry import default_registry
from luthier.reporting.tables import certainty
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier_plugins.metrics.code import code_of
from pydantic import ValidationError

from tests.chat_api import Request, chat_api


def sample(*answers: str, reference: str = "yes", prompt: str = "?", **columns: Any) -> Sample:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}]
    row: Any = {"messages": turns, **columns}
    return Sample(row, prompt, reference, tuple(Completion(answer, 3, "stop") for answer in answers))


def score(uses: Any, *samples: Sample, baseline: list[Sample] | None = None) -> Score:
    return TestContext().build(default_registry().use("metric", uses)).score(list(samples), baseline)


# -- code -------------------------------------------------------------------------------------------

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def add(a, b):\n    return a + b", 1),
        ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
        ("```py\nfrom __future__ import annotations\n```\nand\n```python\ndef add(a, b):\n    return a + b\n```", 1),
        ("```python\ndef add(a, b):\n    return a + b", 1),  # cut off behind the code
        ("```python\ndef add(a, b):\n    return a + b\n```\nOutput:\n```\n5 0\n```", 1),
        ("1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n   That is it.", 1),
        ("def add(a, b):\n    return a - b", 0),
        ("def add(a, b:\n", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\nos._exit(0)", 0),
        ("raise SystemExit", 0),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 0),
        ("x = 'a' * 10**11", 0),
        ("with open('f', 'wb') as f:\n    f.write(b'a' * 2**27)\ndef add(a, b):\n    return a + b", 0),
        ("print('a' * 10**7)\ndef add(a, b):\n    return a + b", 1),
        ("import os\nassert 'LUTHIER_TEST_SECRET' not in os.environ\ndef add(a, b):\n    return a + b", 1),
        ("import os\nassert os.listdir('.') == []\ndef add(a, b):\n    return a + b", 1),
    ],
)
def test_code_is_right_that_comes_to_its_end(answer: str, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_TEST_SECRET", "hidden")
    found = score({"uses": "code_runs", "allow": True}, sample(answer, tests=TESTS))
    assert (found.value, found.unread, dict(found.counts)) == (right, 0, {})


def test_code_that_never_ends_is_stopped_with_what_it_started() -> None:
    endless = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])"
    found = score({"uses": "code_runs", "allow": True, "tests": None, "seconds": 0.5}, sample(endless), sample("a = 1"))
    assert found.by_row == [0.0, 1.0]
    assert found.counts == {"programs were stopped": 1}


def test_what_of_an_answer_is_code() -> None:
    assert code_of("a = 1") == "a = 1"
    assert code_of("```js\nlet a\n```") == ""
    found = score({"uses": "code_runs", "allow": True}, sample("```bash\nls\n```", tests=TESTS))
    assert (found.value, found.unread) == (0, 1)
    goes_on = sample("    return a + b", prompt="def add(a, b):", tests=TESTS)
    assert score({"uses": "code_runs", "allow": True, "with_prompt": True}, goes_on).value == 1
    assert score({"uses": "code_runs", "allow": True}, goes_on).value == 0
    assert (
        score({"uses": "code_runs", "allow": True, "tests": "check"}, sample("a = 1", check="assert a == 1")).value == 1
    )
    assert score({"uses": "code_runs", "allow": True, "memory": 64}, sample("x = 'a' * 2**28", tests="")).value == 0
    with pytest.raises(DataError, match="no code in the column 'tests'"):
        score({"uses": "code_runs", "allow": True}, sample("a = 1"))


@pytest.mark.parametrize("config", [{}, {"allow": False}])
def test_code_runs_only_where_it_may(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="allow"):
        default_registry().use("metric", {"uses": "code_runs", **config})


# -- mathematics ------------------------------------------------------------------------------------


def test_mathematics_is_compared_and_not_text() -> None:
    pairs = [
        (r"The answer is $\frac{1}{2}$.", "0.5", 1.0),
        ("so $x = 3$", "3", 1.0),
        (r"$\boxed{2\sqrt{3}}$", r"$\sqrt{12}$", 1.0),
        ("It is 41.", "#### 42", 0.0),
        ("I do not know", "42", 0.0),
    ]
    found = score("math", *(sample(said, reference=right) for said, right, _ in pairs))
    assert found.by_row == [value for *_, value in pairs]
    assert found.unread == 1
    with pytest.raises(DataError, match="cannot read the reference 'yes'"):
        score("math", sample("1"))


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_is_compared() -> None:
    endless = "$9^{9^{9^{9}}}$"
    found = score({"uses": "math", "seconds": 1}, sample(endless, reference="$2^{1000}$"), sample("4", reference="4"))
    assert found.by_row == [0.0, 1.0]
    assert found.counts == {"comparisons were given up": 1}


# -- several draws ----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    n = len(right)
    k = data.draw(st.integers(1, n))
    from itertools import combinations

    some = [any(chosen) for chosen in combinations(right, k)]
    found = score({"uses": "pass_at_k", "k": k, "n": n}, sample(*("yes" if good else "no" for good in right)))
    assert found.value == pytest.approx(sum(some) / comb(n, k))


def test_pass_at_k_takes_any_metric_of_right_and_wrong() -> None:
    five = sample("#### 4", "5", "none", "4", "3", reference="4")
    found = score({"uses": "pass_at_k", "k": 2, "of": "numeric"}, five)
    assert found.value == pytest.approx(1 - comb(3, 2) / comb(5, 2))
    assert found.unread == 1
    needs = (
        TestContext().build(default_registry().use("metric", {"uses": "pass_at_k", "n": 7, "max_new_tokens": 3})).needs
    )
    assert (needs.answers.n, needs.answers.temperature, needs.answers.max_new_tokens) == (7, 0.8, 3)
    with pytest.raises(LuthierError, match="neither right nor wrong"):
        score({"uses": "pass_at_k", "of": "f1"}, sample(*["so yes"] * 5))
    with pytest.raises(LuthierError, match="does not look at answers alone"):
        score({"uses": "pass_at_k", "of": "perplexity"}, sample(*["yes"] * 5))
    with pytest.raises(ValidationError, match="of 2 answers no 3 can be taken"):
        default_registry().use("metric", {"uses": "pass_at_k", "n": 2, "k": 3})


def test_a_model_is_asked_so_many_times(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "b"}]} for n in range(3)
    ]
    inputs: dict[str, Any] = {"model": tiny_model(tmp_path), "data": tiny_dataset(tmp_path, rows, split="test")}
    config = {"metrics": [{"uses": "pass_at_k", "n": 4, "of": {"uses": "regex", "pattern": "e"}}], "max_new_tokens": 6}
    report = run_stage(tmp_path, "evaluate", config, inputs=inputs)
    assert report.facts["answers"]["given"] == 12
    assert 0 <= report.facts["scores"]["pass_at_k"] <= 1


# -- judges -----------------------------------------------------------------------------------------


def judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, metric: dict[str, Any], answer: Any, says: Any, **more: Any
) -> Artifact:
    """The report on a model whose answers are known, compared with another, judged by a server."""
    stages = iter(["tuned", "base"])

    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        name = next(stages)
        for request in requests:
            yield [Completion(answer(int(request[-1]["content"][1:]), name), 1, "stop")]

    rows: list[Row] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "b"}], "slice": n // 3}
        for n in range(10)
    ]
    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    inputs: dict[str, Any] = {"model": tiny_model(folder), "against": [tiny_model(folder, seed=1)]}
    with chat_api(says) as server:
        generator = {"uses": "openai", "url": server.url, "model": "m"}
        config = {"metrics": [{**metric, "generator": generator}], **more}
        return run_stage(
            folder, "evaluate", config, inputs={**inputs, "data": tiny_dataset(folder, rows, split="test")}
        )


def test_a_judge_gives_marks_and_says_nothing_of_some(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def says(request: Request) -> str:
        assert "A good answer: It is short." in request["messages"][0]["content"]
        text = request["messages"][-1]["content"]
        return "hm" if "q3" in text else "4 of 5" if text.endswith("good") else "**2**"

    metric = {"uses": "judge", "rubric": "It is short.", "best": 5}
    report = judged(tmp_path, monkeypatch, metric, lambda n, name: "good" if name == "tuned" or n < 5 else "bad", says)
    assert report.facts["scores"]["judge"] == 4
    assert report.facts["against"][0]["scores"]["judge"] == pytest.approx((4 * 4 + 5 * 2) / 9)
    assert report.facts["unread"] == {"judge": 1}
    assert report.facts["against"][0]["difference"]["judge"]["rows"] == 9
    with pytest.raises(DataError, match="none of 10 answers got a mark"):
        judged(tmp_path / "silent", monkeypatch, metric, lambda n, name: "good", lambda request: "hm")


def test_a_judge_is_asked_once_for_all_slices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def says(request: Request) -> str:
        asked.append(request["messages"][-1]["content"])
        n = int(asked[-1].split("q")[1].split()[0])
        return "none" if n == 9 else str(n % 4 + 1)

    report = judged(tmp_path, monkeypatch, {"uses": "judge"}, lambda n, name: f"{name} {n}", says, by="slice")
    assert len(asked) == 20
    # Of the slice of which nothing is said there is no number; of the others it is the mean.
    assert report.facts["slices"] == {
        "0": {"judge": pytest.approx((1 + 2 + 3) / 3)},
        "1": {"judge": pytest.approx((4 + 1 + 2) / 3)},
        "2": {"judge": pytest.approx((3 + 4 + 1) / 3)},
        "3": {"judge": None},
    }


def test_the_win_rate_counts_what_wins_in_both_orders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(n: int, name: str) -> str:
        return "same" if n < 2 else f"{name} answer of {n}"

    def says(request: Request) -> str:
        text = request["messages"][-1]["content"]
        n = int(text.split("q")[1].split()[0])
        first = text.split("[first answer]")[1].split("[second answer]")[0]
        if n == 2:
            return "1"  # whatever stands first
        if n == 3:
            return "0"
        if n == 4:
            return "none"
        better = "tuned" if n < 9 else "base"
        return "1" if better in first else "2"

    report = judged(tmp_path, monkeypatch, {"uses": "win_rate"}, answer, says)
    rows = [0.5, 0.5, 0.5, 0.5, None, 1.0, 1.0, 1.0, 1.0, 0.0]
    known = [value for value in rows if value is not None]
    assert report.facts["scores"]["win_rate"] == pytest.approx(sum(known) / len(known))
    assert report.facts["unread"] == {"win_rate": 1}
    about = report.facts["against"][0]["difference"]["win_rate"]
    assert about["value"] == pytest.approx(sum(known) / len(known) - 0.5), "above what two that are alike have"
    assert about["verdict"] == "not told"
    assert report.facts["counts"]["win_rate"] == {
        "pairs were alike": 2,
        "verdicts changed with the order": 1,
        "ties": 1,
        "pairs were decided": 5,
        "times the longer answer won": 4,
    }
    base = report.facts["against"][0]
    assert (base["scores"]["win_rate"], base["counts"]["win_rate"]) == (0.5, {"pairs were alike": 10})
    told = certainty(dict(report.facts), ["tuned", "base"])
    assert any(line.startswith("win_rate of tuned: 2 pairs were alike, ") for line in told)


def test_a_model_that_judges_itself_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        yield from ([Completion("5", 1, "stop")] for _ in requests)

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    rows: list[Row] = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}]
    inputs: dict[str, Any] = {"model": tiny_model(tmp_path), "data": tiny_dataset(tmp_path, rows, split="test")}
    for judge, told in (("model", 1), ("other", 0)):
        others = {} if judge == "model" else {"metrics.0.generator.model": tiny_model(tmp_path, seed=7)}
        metric = {"uses": "judge", "generator": {"uses": "model", "model": judge}}
        report = run_stage(tmp_path, "evaluate", {"metrics": [metric]}, inputs={**inputs, **others})
        assert report.facts["scores"]["judge"] == 5
        assert sum("judges its own answers in 'judge'" in line for line in report.manifest["warnings"]) == told
