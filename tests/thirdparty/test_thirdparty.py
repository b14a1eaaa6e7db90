"""Third-party plugins run through recipes, workers and keys, with nothing in core that knows of them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent / "luthier-thirdparty"
RECIPE = """\
luthier: 1
name: foreign
seed: 5
requires: [luthier-thirdparty>=0.1]
executor: {uses: nice, slots: 2, niceness: 4}
trackers: [sqlite]
stages:
  talks: {uses: data, source: dialogs.jsonl}
  votes: {uses: data, source: votes.jsonl}
  held: {uses: data, source: held.jsonl, split: test, keep: [level]}
  base: {uses: init, data: [talks], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  tuned:
    uses: sft
    model: base
    data: talks
    steps: 20
    learning_rate: 0.05
    log_every: 1
    objective: {uses: focal, gamma: 1.0}
    regularizers: [{uses: confidence, strength: 0.1}]
    optimizer: momentum
    allow_leakage: &why it is asked for what it learned by heart
  plain:
    uses: sft
    model: base
    data: talks
    steps: 20
    learning_rate: 0.05
    log_every: 1
    optimizer: momentum
    allow_leakage: *why
  liked:
    uses: sft
    model: tuned
    data: votes
    steps: 4
    learning_rate: 1e-3
    log_every: 1
    objective: approval
    allow_leakage: *why
  more:
    uses: augment
    data: talks
    method: {uses: asked, generator: {uses: model, model: tuned}}
  quality:
    uses: evaluate
    model: liked
    against: tuned
    data: held
    metrics:
      - drift
      - {uses: judged, name: judge, judge: {uses: model, model: tuned}}
    max_new_tokens: 4
"""
USED_BY = {
    "dialogs": {"talks"}, "thumbs": {"votes"}, "approval": {"liked"}, "focal": {"tuned"}, "drift": {"quality"},
    "judged": {"quality"}, "confidence": {"tuned"}, "momentum": {"tuned", "plain"}, "asked": {"more"},
}  # fmt: skip
"""The stages whose keys a component is part of; trackers and executors change no result."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipe and its data, while the package is installed."""
    place = tmp_path_factory.mktemp("foreign")
    dialogs = [{"dialogs": [[f"say {n}", f"{n}!"], [f"say {n + 10}", f"{n + 10}!"]]} for n in range(6)]
    votes = [
        {"asked": f"say {n}", "said": f"{n}!" if n % 2 else "no", "thumb": "up" if n % 2 else "down"} for n in range(8)
    ]
    held = [
        {
            "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}],
            "level": "hard" if n % 2 else "easy",
        }
        for n in range(4)
    ]
    for name, rows in (("dialogs", dialogs), ("votes", votes), ("held", held)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "foreign.yaml").write_text(RECIPE)
    pip("install", "--no-deps", "--no-build-isolation", str(PACKAGE))
    try:
        yield place
    finally:
        pip("uninstall", "-y", "luthier-thirdparty")


def luthier(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=280, check=False, env=environment
    )


def plan(folder: Path, **variables: str) -> dict[str, dict[str, Any]]:
    done = luthier(folder, "plan", "foreign.yaml", "--json", **variables)
    assert done.returncode == 0, done.stderr
    return {node["stage"]: node for node in json.loads(done.stdout)}


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads(luthier(folder, "show", f"foreign/{stage}", "--json").stdout)


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """The folder after a run."""
    done = luthier(folder, "run", "foreign.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_part_does_what_it_says(ran: Path) -> None:
    assert manifest(ran, "talks")["facts"]["rows"] == {"train": 12}, "two rows out of each"
    assert manifest(ran, "talks")["config"]["format"]["uses"] == "dialogs", "recognised, and recorded"
    assert manifest(ran, "talks")["warnings"] == []
    assert manifest(ran, "votes")["facts"]["schema"] == "labelled"
    focal, plain = (manifest(ran, name)["facts"]["training"] for name in ("tuned", "plain"))
    assert 0 < focal["loss_first"] < plain["loss_first"] + 0.1
    assert focal["loss_last"] < focal["loss_first"]
    liked = manifest(ran, "liked")["facts"]["training"]
    assert liked["loss_first"] == pytest.approx(0.5, abs=1e-5), "the reference is the model itself"
    assert liked["loss_last"] < liked["loss_first"]
    assert manifest(ran, "more")["facts"]["rows"]["train"] > 12
    quality = manifest(ran, "quality")["facts"]
    assert quality["scores"]["drift"] > 0
    assert quality["against"][0]["scores"]["drift"] == pytest.approx(0, abs=1e-6)
    assert quality["scores"]["judge"] in (0.0, 0.25, 0.5)
    assert quality["higher_is_better"] == {"drift": False, "judge": True}


def test_the_tracker_has_config_outcome_and_the_workers_priority(ran: Path) -> None:
    key = manifest(ran, "tuned")["key"]
    (path,) = (ran / ".luthier" / "tracking" / "foreign").glob(f"tuned-{key[:12]}/metrics.db")
    with sqlite3.connect(path) as database:
        ((config, nice, outcome, facts),) = database.execute("select config, nice, outcome, facts from runs")
        losses = database.execute("select step, value from metrics where name = 'loss' order by step").fetchall()
    assert json.loads(config)["objective"] == {"uses": "focal", "gamma": 1.0}
    assert nice >= 4
    assert outcome == "done"
    assert json.loads(facts)["training"]["steps"] == 20
    assert [step for step, _ in losses] == list(range(1, 21))


def test_two_stages_run_side_by_side(ran: Path) -> None:
    (run,) = (ran / ".luthier" / "run").iterdir()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    running, most = set(), 0
    for event in events:
        if event["event"] == "stage_started":
            running.add(event["stage"])
        if event["event"] == "stage_finished":
            running.discard(event["stage"])
        most = max(most, len(running))
    assert most == 2
    assert {path.name for path in run.glob("worker*.log")} == {"worker-nice-0.log", "worker-nice-1.log"}


def test_all_is_cached_until_a_revision_rises(ran: Path) -> None:
    assert {node["status"] for node in plan(ran).values()} == {"cached"}
    for component, stages in USED_BY.items():
        raised = plan(ran, THIRDPARTY_RAISED=component)
        for stage in stages:
            assert raised[stage]["status"] == "run", f"{stage} has {component}"
            assert "new revision (1 -> 2)" in raised[stage]["reason"]
    for component in ("sqlite", "nice"):
        assert {node["status"] for node in plan(ran, THIRDPARTY_RAISED=component).values()} == {"cached"}


def test_edited_code_whose_revision_stayed_is_reported(ran: Path) -> None:
    import luthier_thirdparty

    source = Path(luthier_thirdparty.__file__).parent / "focal.py"
    before = source.read_text()
    try:
        source.write_text(before + "\n# edited\n")
        nodes = plan(ran)
        assert nodes["tuned"]["status"] == "cached"
        assert "the code of objective focal changed since" in nodes["tuned"]["reason"]
        assert "changed since" not in nodes["plain"]["reason"]
        done = luthier(ran, "run", "foreign.yaml", "--only", "tuned")
        assert "its revision did not" in done.stderr
    finally:
        source.write_text(before)


UNREACHABLE = "{uses: openai, url: 'http://127.0.0.1:1', model: m}"
"""A judge that is not there: the check on a small example needs somebody who answers."""


@pytest.mark.parametrize("name", [*USED_BY, "sqlite", "nice"])
def test_a_part_conforms(ran: Path, name: str) -> None:
    given = {"judged": "judge", "asked": "generator"}.get(name)
    done = luthier(ran, "plugin", "check", name, *(["--set", f"{given}={UNREACHABLE}"] if given else []))
    problems = [line for line in done.stdout.splitlines() if "FAILED" in line]
    if given is None:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert problems == ["  FAILED  it behaves on a small example"]
        assert "http://127.0.0.1:1/v1 cannot be reached" in done.stdout


def test_a_value_that_is_needed_is_asked_for(ran: Path) -> None:
    done = luthier(ran, "plugin", "check", "judged")
    assert done.returncode == 1
    assert "'judge' has no default: give a value, with --set judge=VALUE" in done.stdout
