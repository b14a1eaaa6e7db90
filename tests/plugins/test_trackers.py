"""Services that keep metrics: the recipe's config, one run for a stage that is resumed, and how it ended."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from luthier import run
from luthier.api import LuthierError, RunInfo, Tracker
from luthier.artifacts.extras import needed
from luthier.registry import default_registry
from luthier.testing import TestContext

CONFIG = {"uses": "sft", "steps": 4, "adapter": {"uses": "lora", "r": 8}}
FACTS = {"training": {"loss_last": 0.25, "trained": {"parameters": 12}, "kind": "model"}}
Seen = tuple[dict[str, Any], dict[int, float], str]
"""The config, the losses by step, and the outcome."""


def seen_by_mlflow(folder: Path) -> Seen:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("taught").experiment_id])
    losses = {item.step: item.value for item in client.get_metric_history(found.info.run_id, "loss")}
    assert len(client.get_metric_history(found.info.run_id, "loss")) == len(losses)
    assert found.data.metrics["final.loss_last"] == 0.25
    assert found.info.status == "FINISHED"
    return dict(found.data.params), losses, found.data.tags["outcome"]


def seen_by_trackio(folder: Path) -> Seen:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("taught")
    logs = SQLiteStorage.get_logs("taught", name)
    losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert sum("loss" in entry for entry in logs) == len(losses)
    assert logs[-1]["final/loss_last"] == 0.25
    return SQLiteStorage.get_run_config("taught", name) or {}, losses, logs[-1]["outcome"]


def records(path: Path) -> Iterator[Any]:
    """What an offline run of Weights & Biases holds: a log in blocks of 32 KiB, as LevelDB has it."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def seen_by_wandb(folder: Path) -> Seen:
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1, "one run, whose parts are uploaded one after the other"
    config: dict[str, Any] = {}
    losses: dict[int, float] = {}
    summary: dict[str, Any] = {}
    for record in [record for path in files for record in records(path)]:
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if "loss" in values:
            assert record.history.step.num not in losses
            losses[record.history.step.num] = float(values["loss"])
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert summary["loss_last"] == 0.25
    return config, losses, summary["outcome"]


SERVICES: dict[str, tuple[dict[str, Any], Callable[[Path], Seen]]] = {
    "wandb": ({"mode": "offline"}, seen_by_wandb),
    "mlflow": ({}, seen_by_mlflow),
    "trackio": ({}, seen_by_trackio),
}


def started(name: str, folder: Path, *, resumed: bool, step: int) -> Tracker[Any]:
    use = default_registry().use("tracker", {"uses": name, **SERVICES[name][0]})
    tracker: Tracker[Any] = default_registry().build(use, TestContext())
    folder.mkdir(parents=True, exist_ok=True)
    tracker.start(
        RunInfo(
            "run-1", "taught", "tuned", "sft", "0123456789abcdef", CONFIG, {}, resumed=resumed, folder=folder, step=step
        )
    )
    return tracker


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to the user's own folders."""
    import trackio
    import trackio.sqlite_storage

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


@pytest.mark.parametrize("name", SERVICES)
def test_a_resumed_stage_goes_on_in_its_run_and_ends_with_its_outcome(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "taught" / "tuned"
    tracker = started(name, folder, resumed=False, step=0)
    for step in (1, 2, 3):
        tracker.log({"loss": 1 / step}, step)
    if name == "wandb":
        # Killed processes leave their files; here it has to be told.
        tracker._run.finish(exit_code=1)  # type: ignore[attr-defined]
    # Killed after step 3, it goes on from the checkpoint of step 2.
    tracker = started(name, folder, resumed=True, step=2)
    for step in (3, 4):
        tracker.log({"loss": 1 / step}, step)
    tracker.finish("done", FACTS)
    config, losses, outcome = SERVICES[name][1](folder)
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25})
    assert outcome == "done"
    assert int(config["steps"]) == 4
    assert int(config["adapter"]["r"] if name == "wandb" else config["adapter.r"]) == 8


RECIPE = """\
luthier: 1
name: taught
trackers: [{uses: wandb, mode: offline}, mlflow, trackio]
stages:
  start: {uses: init, data: [./chats.jsonl], vocab_size: 300, hidden_size: 32, layers: 1, heads: 2}
  tuned: {uses: sft, model: start, data: ./chats.jsonl, steps: 3, log_every: 1}
"""


def test_a_recipe_names_several(tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "taught.yaml").write_text(RECIPE)
    result = run(tmp_path / "taught.yaml", store=tmp_path / "s")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    (wandb,) = tmp_path.glob("**/wandb/offline-run-*/*.wandb")
    losses = [
        record
        for record in records(wandb)
        if any(item.key == "loss" or item.nested_key == ["loss"] for item in record.history.item)
    ]
    assert len(losses) == 3
    assert list(tmp_path.glob("**/mlflow.db"))
    assert list(tmp_path.glob("trackio/*.db"))


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(LuthierError, match="no-such-library is not installed"):
        needed("no_such_library", "no-such-library", "trackers")
