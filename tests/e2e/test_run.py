"""Running recipes through the command line, well and badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.api import RecipeError
from luthier.artifacts.datasets import read_split
from luthier.artifacts.store import Store


def test_a_run_then_a_cached_run(recipe: Path, tmp_path: Path) -> None:
    first = run(recipe, store=tmp_path / "s")
    assert {name: stage.outcome for name, stage in first.stages.items()} == {"chats": "done", "more": "done"}
    made = first.artifact("more")
    assert len(read_split(made, "train")) == 30 - len(read_split(made, "test")) < 30
    assert read_split(made, "test") == read_split(first.artifact("chats"), "test")
    assert made.manifest["inputs"] == {"data": [first.artifact("chats").key]}
    assert not Store.at(tmp_path / "s").work(made.key).exists()
    second = run(recipe, store=tmp_path / "s")
    assert {stage.outcome for stage in second.stages.values()} == {"cached"}


def test_the_plan_says_which_field_changed(recipe: Path, cli, tmp_path: Path) -> None:
    assert cli("run", "small.yaml").returncode == 0
    told = cli("plan", "small.yaml", "--set", "stages.more.method.count=5").stdout
    assert "method.count: 20 -> 5" in told
    told = cli("plan", "small.yaml", "--set", "stages.chats.split.test=0.4").stdout
    assert "split.test: 0.2 -> 0.4" in told
    assert "input chats changed" in told


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "is not valid JSON"),
        ('{"messages": []}', "has no messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends with a turn of the user"),
    ],
)
def test_a_bad_row_names_file_line_and_remedy(recipe: Path, chats: Path, cli, row: str, message: str) -> None:
    chats.write_text(chats.read_text() + row + "\n")
    done = cli("run", "small.yaml")
    assert done.returncode == 1
    assert f"{chats}:11: " in done.stderr
    assert message in done.stderr
    assert "bad_rows: {drop_up_to: 0.091}" in done.stderr
    kept = cli("run", "small.yaml", "--set", "stages.chats.bad_rows={drop_up_to: 0.1}")
    assert kept.returncode == 0
    assert "1 rows were dropped" in kept.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n  {"messages": []}\n', "is not valid JSON"),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}\n',
            "surrogate",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b", "tool_calls": [1]}]}\n',
            "a tool call without the name",
        ),
    ],
)
def test_data_that_is_something_else_is_one_message(recipe: Path, chats: Path, cli, text: str, message: str) -> None:
    chats.write_text(text)
    done = cli("run", "small.yaml")
    # What a glance at the file shows is reported by the plan, the rest when its rows are read.
    assert done.returncode == (1 if message != "surrogate" else 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_first_row_is_dropped_like_any_other_and_unused_keys_are_reported(recipe: Path, chats: Path, cli) -> None:
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    rows[0]["rating"] = 5
    rows[1]["messages"][0]["mood"] = "fine"
    chats.write_text('{"foo": 1}\n' + "".join(json.dumps(row) + "\n" for row in rows))
    refused = cli("run", "small.yaml")
    assert refused.returncode == 1
    assert f"{chats}:1: " in refused.stderr
    kept = cli("run", "small.yaml", "--set", "stages.chats.bad_rows={drop_up_to: 0.1}")
    assert kept.returncode == 0
    assert "rating (in 1 rows)" in kept.stderr
    assert "messages.mood (in 1 rows)" in kept.stderr


def test_an_empty_data_file(recipe: Path, chats: Path, cli) -> None:
    chats.write_text("")
    done = cli("run", "small.yaml")
    assert done.returncode == 2
    assert "has no rows" in done.stderr


def test_what_was_finished_survives_a_later_failure(recipe: Path, cli, tmp_path: Path) -> None:
    done = cli("run", "small.yaml", "--set", "stages.more.method.count=5000")
    assert done.returncode == 1
    assert "lower `count`" in done.stderr
    assert "chats  cached" in cli("plan", "small.yaml").stdout


def test_a_read_only_store(recipe: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("run", "small.yaml", "--store", "file/store")
    assert done.returncode == 1
    assert "--store" in done.stderr


def test_two_runs_at_once_make_each_artifact_once(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "small.yaml", "--json"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    events = [json.loads(line) for process in both for line in process.communicate(timeout=120)[0].splitlines()]
    assert [process.returncode for process in both] == [0, 0]
    made = [event["stage"] for event in events if event["event"] == "stage_finished"]
    assert sorted(made) == ["chats", "more"]


def test_sigint_ends_with_130_and_leaves_no_lock(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("count: 20", "count: 400000").replace("[100, 999]", "[1, 99999999]"))
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "small.yaml", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["stage"] == "more":
            break
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list((tmp_path / ".luthier" / "locks").glob("*.lock"))
    assert [artifact.manifest["stage"] for artifact in Store.at(tmp_path / ".luthier")] == ["chats"]


def test_a_killed_worker_is_a_failed_stage_not_a_dead_run(recipe: Path, tmp_path: Path) -> None:
    import psutil

    recipe.write_text(recipe.read_text().replace("count: 20", "count: 400000").replace("[100, 999]", "[1, 99999999]"))
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "small.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    store = Store.at(tmp_path / ".luthier")
    until = time.monotonic() + 60
    while len(list(store)) < 1 and time.monotonic() < until:
        time.sleep(0.05)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in errors
    assert len(list(store)) == 1


def test_what_is_known_of_the_data_is_said_before_training(chats: Path, tmp_path: Path) -> None:
    stages = {
        "base": {"uses": "base"},
        "tuned": {"uses": "sft", "model": "base", "data": "talks", "steps": 500},
        "talks": {"uses": "data", "source": "chats.jsonl", "split": {"test": 0.2}},
        "scored": {"uses": "evaluate", "model": "tuned", "data": "talks", "by": "topic"},
    }
    recipe = Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=tmp_path)
    made = plan(recipe, tmp_path / "s")
    # What is quick comes first, wherever it stands in the file.
    assert list(made.nodes) == ["base", "talks", "tuned", "scored"]
    started: list[str] = []

    def note(event: dict) -> None:
        if event["event"] == "stage_started":
            started.append(event["stage"])

    result = run(made, listeners=[note])
    assert result.exit_code == 1
    assert "the data has no column 'topic', which `by` names" in str(result.stages["scored"].error)
    assert result.stages["tuned"].outcome == "skipped"
    assert sorted(started) == ["base", "talks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"talks": {"split": {}}}, "the data has no split 'test'"),
        ({"talks": {"split": "test"}}, "no rows in the split 'train'"),
        ({"tuned": {"adapter": {"uses": "lora", "target_modules": ["v_prj"]}}}, "did you mean 'v_proj'"),
        ({"tuned": {"uses": "dpo"}}, "reads rows of the schema preference, not messages"),
        ({"base": {"source": "."}}, "no folder of a model: it has no config.json"),
    ],
)
def test_what_files_tell_is_known_while_planning(chats: Path, tmp_path: Path, change: dict, message: str) -> None:
    stages = {
        "base": {"uses": "base"},
        "talks": {"uses": "data", "source": "chats.jsonl", "split": {"test": 0.2}},
        "tuned": {"uses": "sft", "model": "base", "data": "talks", "steps": 5},
        "scored": {"uses": "evaluate", "model": "tuned", "data": "talks"},
    }
    changed = {name: {**stage, **change.get(name, {})} for name, stage in stages.items()}
    with pytest.raises(RecipeError, match=message):
        plan(Recipe.from_mapping({"luthier": 1, "stages": changed}, folder=tmp_path), tmp_path / "s")
