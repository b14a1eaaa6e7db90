"""The report on runs: real ones, that ended well, failed, were killed, and go on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from luthier import run
from luthier.api import StoreError
from luthier.artifacts.store import Store
from luthier.reporting.compare_page import changes
from luthier.reporting.examples import FEW, most_unlike
from luthier.reporting.pictures import MOST_POINTS, curve, duration, forest, short, thinned
from luthier.reporting.run_page import page
from luthier.reporting.runs import RunRecord, StageRecord, found_run, read_run, run_ids

VOID = {"meta", "br"}
RECIPE = """\
luthier: 1
name: told
stages:
  talks: {uses: data, source: talks.jsonl, keep: [slice]}
  held: {uses: data, source: held.jsonl, split: test, keep: [slice]}
  base: {uses: init, data: [talks], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  tuned: {uses: sft, model: base, data: talks, steps: 12, learning_rate: 3e-3, batch_size: 2, save_every: 2}
  quality:
    uses: evaluate
    model: tuned
    data: held
    by: slice
    metrics: [perplexity, exact_match]
    max_new_tokens: 4
    require: {perplexity: "< 1000"}
"""


class Checked(HTMLParser):
    """Every tag is closed, and nothing comes from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.anchors: dict[str, set[str]] = {"id": set(), "href": set()}
        self.labelled = 0
        self.feed(text)
        assert self.open == []
        assert {name.removeprefix("#") for name in self.anchors["href"]} <= self.anchors["id"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in ("script", "link", "iframe", "img")
        assert not {name for name in given if name.startswith("on") or name == "src"}
        for kind, found in self.anchors.items():
            if given.get(kind):
                found.add(str(given[kind]))
        if tag == "svg":
            assert given.get("aria-label")
            self.labelled += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed already."""

    def handle_endtag(self, tag: str) -> None:
        # The closing tags of html, head, ... of cells and of items are there, too.
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, words in (("talks", ["yes", "no", "blue", "<b>7</b>"]), ("held", ["one", "two", "three", "<i>4</i>"])):
        rows = [
            {"slice": f"s{n % 2}", "messages": [{"role": "user", "content": f"{name} {n} <script>x</script>"},
                                                 {"role": "assistant", "content": word}]}
            for n, word in enumerate(words)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "told.yaml").write_text(RECIPE)
    return tmp_path


def test_a_run_is_told_whole(folder: Path, cli: Any) -> None:
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 0
    done = cli("report", "told", "-o", "out/told.html")
    assert done.returncode == 0, done.stderr
    text = (folder / "out" / "told.html").read_text()
    found = Checked(text)
    assert "http" not in re.sub(r"https?://www\.w3\.org\S*", "", text), "nothing comes from a network"
    for word in ("Run of told", "Evaluation", "Training", "Data", "To do it again", "critical path", "s0 perplexity"):
        assert word in found.text
    assert "held 0 <script>x</script>" in found.text
    assert "the gate perplexity < 1000 holds" in found.text
    # Compared with its base, which the recipe does not name under `against`.
    assert "tuned is better than base" in found.text or "tuned cannot be told from base" in found.text
    assert found.labelled >= 5
    store = Store(folder / ".luthier")
    record = read_run(store, found_run(store, "told"))
    assert list(record.stages) == ["talks", "held", "base", "tuned", "quality"]
    assert {stage.outcome for stage in record.stages.values()} == {"done"}
    assert record.critical_path[-2:] == ["tuned", "quality"]
    assert [step for step, values in record.stages["tuned"].curve if "loss" in values][-1] == 12
    rates = [values["learning_rate"] for _, values in record.stages["tuned"].curve if "learning_rate" in values]
    assert f"from {short(rates[0])} to {short(rates[-1])}" in found.text

    # A second run: all is cached, and its report draws what the first one logged.
    (folder / "told.yaml").write_text(RECIPE.replace("4\n    require", "3\n    require"))
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 0
    again = read_run(store, found_run(store, "told"))
    assert again.id != record.id
    assert again.stages["tuned"].outcome == "cached"
    assert again.stages["tuned"].curve == record.stages["tuned"].curve
    assert again.critical_path == ["quality"]
    assert changes(record, again) == [["quality", "max_new_tokens", "4", "3"]]
    # Another gate changes no key: all is cached, and yet it is said.
    (folder / "told.yaml").write_text(RECIPE.replace("4\n    require", "3\n    require").replace("< 1000", "< 2000"))
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 0
    gated = read_run(store, found_run(store, "told"))
    assert changes(again, gated) == [["quality", "require.perplexity", "< 1000", "< 2000"]]
    assert "< 2000" in Checked(page(gated)).text
    again = gated
    done = cli("report", record.id, again.id)
    assert done.returncode == 0, done.stderr
    two = Checked((folder / f"{record.id}-and-{again.id}.html").read_text())
    assert "max_new_tokens" in two.text
    assert "exact_match" in two.text
    told = json.loads(cli("runs", "--json").stdout)
    assert [item["run"] for item in told] == [
        again.id,
        *(name for name in run_ids(store) if name not in (again.id, record.id)),
        record.id,
    ]
    assert told[0]["scores"]["quality"].keys() == {"perplexity", "exact_match"}
    shown = cli("runs", "--recipe", "told").stdout
    assert shown.count("done") == 3
    assert "no runs of 'other'" in cli("runs", "--recipe", "other").stdout


def test_a_run_that_failed_says_why_and_a_gate_what_it_measured(folder: Path, cli: Any) -> None:
    (folder / "told.yaml").write_text(RECIPE.replace("< 1000", "< 1"))
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 3
    store = Store(folder / ".luthier")
    first = read_run(store, found_run(store, "told"))
    assert first.state == "gate"
    text = Checked(page(first)).text
    assert "a gate did not hold" in text
    assert "quality: the gate perplexity < 1 does not hold" in text
    (folder / "held.jsonl").write_text('{"messages": []}\n')
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 1
    second = read_run(store, found_run(store, "told"))
    assert second.state == "failed"
    text = Checked(page(second)).text
    assert "held failed: " in text
    assert second.stages["quality"].outcome == "skipped"
    assert "skipped" in text
    done = cli("report", "nothing")
    assert done.returncode == 1
    assert "no run, and no recipe that was run, is called 'nothing'" in done.stderr


def test_a_run_that_was_killed_and_continued_has_one_curve(folder: Path) -> None:
    (folder / "told.yaml").write_text(RECIPE.replace("steps: 12", "steps: 60"))
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "told.yaml"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = Store(folder / ".luthier")
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(0.05)
        logged = [path.read_text() for path in store.runs.glob("*/events.jsonl")]
        if logged and '"loss"' in logged[0] and len(list(store.root.glob("work/*/**/*checkpoint*"))) > 0:
            break
    going = read_run(store, found_run(store, "told"))
    assert going.state == "running"
    assert "still running" in Checked(page(going)).text
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    path = store.runs / going.id / "events.jsonl"
    with path.open("a") as file:
        file.write('{"event": "metr')
    killed = read_run(store, going.id)
    assert killed.unread == 1
    assert "1 lines of its events cannot be read" in Checked(page(killed)).text
    assert run(folder / "told.yaml", store=store.root).exit_code == 0
    whole = read_run(store, found_run(store, "told")).stages["tuned"]
    steps = [step for step, values in whole.curve if "loss" in values]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-1] == 60


def test_a_plugins_table_and_ten_thousand_rows_are_shown(folder: Path) -> None:
    assert run(folder / "told.yaml", store=folder / ".luthier").exit_code == 0
    store = Store(folder / ".luthier")
    record = read_run(store, found_run(store, "told"))
    artifact = record.stages["quality"].artifact
    assert artifact is not None
    for role in ("model", "against-1"):
        with (artifact.path / f"{role}.jsonl").open("w") as file:
            for n in range(10_000):
                score = float((n % 7 > 0) if role == "model" else (n % 5 > 0)) * (1 + n / 10_000)
                row = {"prompt": "p" * 5000, "reference": f"r{n}", "answers": {"exact_match": ["a" * 5000]}}
                file.write(json.dumps({**row, "scores": {"perplexity": score}}) + "\n")
    higher, lower = most_unlike(artifact.path, "perplexity")
    assert (len(higher), len(lower)) == (FEW, FEW)
    assert [item.row for item in higher] == [n + 1 for n in range(9995, 9965, -5) if n % 7][:FEW]
    assert all(item.gain > 0 for item in higher)
    assert all(item.gain < 0 for item in lower)
    artifact.facts["table"]["columns"].append("mine")
    for row in artifact.facts["table"]["rows"]:
        row.append("<so>")
    text = page(record)
    assert "<so>" in Checked(text).text
    assert len(text) < 500_000
    artifact.facts.pop("scores")
    assert "Exports and tables" in Checked(page(record)).text


def test_which_run_is_meant(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("20260101-100000-a-1", "20260101-100001-a-b-2", "20260102-100000-a-3"):
        (store.runs / name).mkdir(parents=True)
        (store.runs / name / "events.jsonl").write_text("")
    assert run_ids(store)[0] == found_run(store, "a") == "20260102-100000-a-3"
    assert found_run(store, "a-b") == found_run(store, "20260101-100001") == "20260101-100001-a-b-2"
    with pytest.raises(StoreError, match="2 runs begin with '20260101'"):
        found_run(store, "20260101")
    empty = read_run(store, "20260101-100000-a-1")
    assert (empty.recipe, empty.stages, empty.state) == ("a", {}, "running")
    Checked(page(empty))


def test_the_critical_path_is_the_longest_one() -> None:
    stages = {
        "a": StageRecord("a", outcome="done", seconds=5),
        "b": StageRecord("b", outcome="cached", seconds=500),
        "c": StageRecord("c", waits_for=["a", "b"], outcome="done", seconds=1),
        "d": StageRecord("d", waits_for=["a"], outcome="done", seconds=3),
        "e": StageRecord("e", waits_for=["c", "d"], outcome="failed", seconds=2, message="no <room>"),
    }
    record = RunRecord("20260101-100000-x-1", "x", stages=stages)
    assert record.critical_path == ["a", "d", "e"]
    text = page(record)
    Checked(text)
    assert text.count('class="edge critical"') == 2
    assert "a → d → e: 10.0 s" in text


def test_pictures_of_odd_numbers() -> None:
    points = [(float(n), float((n * 37) % 1000)) for n in range(50_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {max(y for _, y in kept), min(y for _, y in kept)} == {0.0, 999.0}
    assert kept == sorted(kept)
    nan = float("nan")
    assert "1 values are no numbers" in curve([(1, 2.0), (2, nan), (3, 1.0)], "loss")
    assert "2 of 3 values are no numbers" in curve([(1, 2.0), (2, nan), (3, float("inf"))], "loss")
    for drawn in (curve([(1, 2.0), (2, 2.0)], "<loss>"), forest([("<a>", 0.5, 0.5, 0.5)], "same", 0.0)):
        assert "nan" not in drawn
        Checked(drawn)
    numbers = {0.0: "0", 0.12345: "0.123", 12.5: "12.5", 1234.5: "1,234", 1e-7: "1e-07", 1e9: "1e+09"}
    assert {value: short(value) for value in numbers} == numbers
    assert [duration(value) for value in (3.21, 75, 7322)] == ["3.2 s", "1 min 15 s", "2 h 02 min"]
