"""What the formats that come with Luthier make of a file's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from luthier.api import Artifact, DataError
from luthier.artifacts.datasets import read_split
from luthier.testing import run_stage

PAIR = {"prompt": "lamp on", "chosen": "On.", "rejected": "Off."}
VOTE = {"prompt": "lamp on", "completion": "On.", "label": True}


def read(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Artifact:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_stage(folder, "data", {"source": str(source), **config})


def answers(data: Artifact) -> list[tuple[str, bool]]:
    return [(row["completion"][0]["content"], row["label"]) for row in read_split(data, "train")]


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "1"])
def test_labelled_answers_are_recognised_and_may_have_numbers(tmp_path: Path, label: Any) -> None:
    data = read(tmp_path, [{**VOTE, "label": label}])
    assert data.facts["schema"] == "labelled"
    assert answers(data) == [("On.", label not in (False, 0, "False"))]


@pytest.mark.parametrize("label", [None, "yes", 2, 0.5])
def test_a_label_that_is_neither_is_refused(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match="no true or false under 'label'"):
        read(tmp_path, [{**VOTE, "label": label}])


def test_keys_of_labelled_answers_have_other_names(tmp_path: Path) -> None:
    names = {"prompt": "asked", "completion": "said", "label": "liked"}
    data = read(tmp_path, [{names[key]: value for key, value in VOTE.items()}], format={"uses": "labelled", **names})
    assert answers(data) == [("On.", True)]


def test_pairs_are_taken_apart_where_a_recipe_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, [PAIR]).facts["schema"] == "preference"
    data = read(tmp_path, [PAIR], format="unpaired")
    assert data.facts["schema"] == "labelled"
    assert answers(data) == [("On.", True), ("Off.", False)]
