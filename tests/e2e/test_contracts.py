"""What stages, formats and trackers owe each other, and what happens when one does not keep to it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inline_plugins import put_on_path
from luthier import Recipe, plan
from luthier.api import DataError, PluginError, RecipeError, RunInfo
from luthier.artifacts.checkpoints import last_step, mark_whole
from luthier.artifacts.datasets import dataset_facts, read_split
from luthier.artifacts.rows import COLUMNS, SCHEMAS, schema_of
from luthier.artifacts.store import Store
from luthier.registry import default_registry
from luthier.testing import TestContext, run_stage
from luthier.worker.tracking import Trackers
from luthier_plugins.data.recognise import recognised
from luthier_plugins.trackers.config import JsonlConfig
from luthier_plugins.trackers.jsonl import Jsonl


def planned(folder: Path, **stages: Any) -> Any:
    return plan(Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=folder), folder / "s")


@pytest.mark.parametrize("column", sorted({column for columns in COLUMNS.values() for column in columns}))
def test_a_kept_key_cannot_change_what_a_row_means(tmp_path: Path, chats: Path, column: str) -> None:
    with pytest.raises(RecipeError, match=f"'{column}' is a column with a meaning of its own"):
        planned(tmp_path, x={"uses": "data", "source": "chats.jsonl", "keep": [column]})


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_row_is_of_one_schema_whatever_stands_beside_it(schema: Any) -> None:
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS[schema], ""), "level": "hard"}
    assert schema_of(row) == schema
    for other in SCHEMAS:
        more = {**row, **dict.fromkeys(COLUMNS[other], "")}
        if more.keys() != row.keys():
            with pytest.raises(DataError, match=f"the schema {schema}"):
                dataset_facts(schema, {"train": [more]}, {})


FORMAT = """
from typing import ClassVar


class C(Config):
    \"\"\"Nothing to choose.\"\"\"


class I(Format):
    schema: ClassVar = "messages"

    def recognises(self, raw):
        return "hi" in raw

    def parse(self, raw):
        yield {"messages": raw["hi"]}
"""


def test_rows_of_a_format_are_checked_against_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    put_on_path(tmp_path, monkeypatch, "format", "odd", FORMAT)
    (tmp_path / "x.jsonl").write_text('{"hi": "there"}\n')
    (tmp_path / "r.yaml").write_text("luthier: 1\nstages: {x: {uses: data, source: x.jsonl, format: odd}}\n")
    done = cli("run", "r.yaml")
    assert done.returncode == 1
    assert "x.jsonl:1" in done.stderr
    assert "has no messages under 'messages'" in done.stderr


def test_a_format_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chats: Path) -> None:
    from luthier_plugins.formats.text import Text

    def broken(self: Text, raw: Any) -> bool:
        raise RuntimeError("oops")

    monkeypatch.setattr(Text, "recognises", broken)
    with pytest.raises(PluginError, match=r"the format 'text' of luthier .*RuntimeError: oops"):
        recognised([chats], {}, default_registry())


def test_rows_of_two_schemas_are_not_trained_together() -> None:
    from luthier.api import TuningConfig

    config = TuningConfig.model_validate({"model": "m", "data": ["a", "b"]}, context={"components": default_registry()})
    facts = {"data": [{"schema": "messages"}, {"schema": "preference"}]}
    assert any("different schemas (messages, preference)" in text for text in config.early_problems(facts))
    assert config.early_problems({"data": [{"schema": "messages"}, {}]}) == []


@pytest.mark.parametrize(
    ("stage", "message"),
    [("pretrain", "packed blocks of text are not"), ("sft", None)],
)
def test_an_objective_on_pairs_is_refused_where_text_is_packed(
    tmp_path: Path, chats: Path, stage: str, message: str | None
) -> None:
    stages = {"base": {"uses": "base"}, "x": {"uses": stage, "model": "base", "data": "./chats.jsonl"}}
    stages["x"]["objective"] = "dpo"
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    if message is None:
        assert planned(tmp_path, **stages).nodes["x"].status == "run"
    else:
        with pytest.raises(RecipeError, match=message):
            planned(tmp_path, **stages)


def test_trackers_stay_in_their_folder(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    for name in ("data(../../x.jsonl)", "../..", "a/b"):
        folder = store.tracking(name, name, "0" * 64)
        assert folder.parent.parent == tmp_path / "tracking"
        assert ".." not in folder.parts


class Noted:
    """Keeps how it ended; one of two cannot start."""

    ended: list[str] = []

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def start(self, run: RunInfo) -> None:
        if self.fails:
            raise RuntimeError("no such server")

    def finish(self, outcome: str, facts: Any) -> None:
        self.ended.append(outcome)


def test_a_tracker_that_cannot_start_ends_those_before_it(tmp_path: Path) -> None:
    waiting = [Noted(False), Noted(True)]
    registry: Any = SimpleNamespace(
        use=lambda kind, given: SimpleNamespace(name=given, component=None),
        provider=lambda component: "somewhere 1.0",
        build=lambda use, context: waiting.pop(0),
    )
    job: Any = SimpleNamespace(
        run="r", recipe="r", stage="s", component="sft", key="0", config={}, step=None,
        trackers=["one", "two"], tracking=str(tmp_path / "t"),
    )  # fmt: skip
    with pytest.raises(PluginError, match=r"the tracker 'two' of somewhere 1\.0 cannot start"):
        Trackers(job, registry, TestContext())
    assert Noted.ended == ["failed"]


def test_a_resumed_file_holds_each_step_once(tmp_path: Path) -> None:
    def logged(steps: range, resumed: bool, step: int) -> None:
        tracker = Jsonl(JsonlConfig(), TestContext())
        tracker.start(RunInfo("run", "recipe", "s", "sft", "key", {}, {}, resumed, tmp_path, step))
        for number in steps:
            tracker.log({"loss": 1.0}, number)
        tracker.finish("interrupted", {})

    # Stopped after step 5, with a checkpoint after step 3.
    logged(range(1, 6), False, 0)
    logged(range(4, 8), True, 3)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 8))


def test_the_last_step_is_that_of_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    for step in (9, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 20):
        mark_whole(tmp_path / f"checkpoint-{step}")
    assert last_step(tmp_path) == 20


def test_keys_inside_the_messages_of_pairs_are_not_lost_unseen(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "because", "mood": "fine"}
    pair = {"prompt": "why?", "chosen": [answer], "rejected": [{"role": "assistant", "content": "no", "score": 0}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    made = run_stage(tmp_path / "s", "data", {"source": str(tmp_path / "pairs.jsonl"), "format": "preference"})
    (warning,) = made.manifest["warnings"]
    assert "chosen.mood (in 1 rows)" in warning
    assert "rejected.score (in 1 rows)" in warning
    assert "reasoning" not in warning
    assert read_split(made, "train")[0]["chosen"][0]["reasoning"] == "because"
