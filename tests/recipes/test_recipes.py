"""The recipes people start from: their data is what they say, and the quickstart keeps its promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.artifacts.datasets import read_split
from luthier.artifacts.store import Store

RECIPES = Path(__file__).parents[2] / "recipes"
DATA = RECIPES / "data" / "quickstart"
ROOMS = ({"kitchen", "bedroom", "hall", "garage"}, {"bathroom", "office", "attic", "cellar"})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_plans(path: Path, tmp_path: Path) -> None:
    assert plan(Recipe.load(path), tmp_path / "s").nodes


def answers(name: str) -> dict[str, dict[str, object]]:
    """The command that each request of a data file stands for."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["messages"][0]["content"]: json.loads(row["messages"][-1]["content"]) for row in rows}


def test_the_test_split_has_no_phrasing_and_no_combination_of_the_training_data() -> None:
    home, reminders, test = answers("home"), answers("reminders"), answers("test")
    assert not set(test) & (set(home) | set(reminders))
    trained = {(row["device"], row["room"]) for row in home.values()}
    tasks = {(row["what"], row["when"]) for row in reminders.values()}
    for command in test.values():
        if command["do"] == "remind":
            assert (command["what"], command["when"]) not in tasks
        else:
            assert (command["device"], command["room"]) not in trained


def test_rows_from_templates_leave_the_test_split_alone(tmp_path: Path) -> None:
    """Each device belongs to rooms of one half of the house in training, and to the other half in the test."""
    stages = ["more-home", "easy-reminders", "more-reminders"]
    result = run(RECIPES / "quickstart.yaml", store=tmp_path / "s", only=stages)
    assert result.exit_code == 0
    test = answers("test")
    held = {tuple(sorted(str(value) for value in command.values())) for command in test.values()}
    for stage in stages:
        for row in read_split(result.artifact(stage), "train"):
            request, answer = (message["content"] for message in row["messages"])
            assert request not in test
            command = json.loads(answer)
            assert tuple(sorted(str(value) for value in command.values())) not in held, request
            if "device" in command:
                half = next(rooms for rooms in ROOMS if command["room"] in rooms)
                others = {row["device"] for row in test.values() if row.get("room") in half}
                assert command["device"] not in others


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_keeps_its_promises() -> None:
    """Runs in the store that `make quickstart` uses: where that was run before, everything is cached."""
    store = Store.at(RECIPES.parent / ".luthier")
    result = run(RECIPES / "quickstart.yaml", store=store)
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items() if stage.error}
    columns, rows = (result.artifact("quality").facts["table"][key] for key in ("columns", "rows"))
    table = {name: dict(zip(columns, values, strict=True)) for name, *values in rows}
    assert table["base"]["exact_match"] <= 0.02
    assert table["merged"]["exact_match"] >= 0.80
    for slice_of in ("home exact_match", "reminders exact_match"):
        weaker = min(table["preferred"][slice_of], table["reminded"][slice_of])
        assert table["merged"][slice_of] >= weaker
    for stage, distance in (("served", 0.05), ("served-q8", 0.02)):
        facts = result.artifact(stage).facts
        assert facts["scores"]["exact_match"] >= facts["against"][0]["scores"]["exact_match"] - distance
    again = run(RECIPES / "quickstart.yaml", store=store)
    assert {stage.outcome for stage in again.stages.values()} == {"cached"}
    changed = Recipe.load(RECIPES / "quickstart.yaml", overrides=["stages.preferred.beta=0.2"])
    rerun = {name for name, node in plan(changed, store).nodes.items() if node.status != "cached"}
    assert rerun == {"preferred", "merged", "merged-slerp", "merged-ties", "quality", "gguf", "served", "served-q8"}
