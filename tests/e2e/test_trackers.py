"""Metrics reach the recipe's trackers; ORPO learns to prefer, on a model and on an adapter."""

from __future__ import annotations

import json
from pathlib import Path

from luthier import run
from luthier.artifacts.store import Store
from luthier.testing import run_stage, tiny_dataset, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RECIPE = """\
luthier: 1
name: tracked
trackers: [jsonl, {uses: tensorboard}]
stages:
  start: {uses: init, data: [./chats.jsonl], vocab_size: 300, hidden_size: 32, layers: 1, heads: 2}
  tuned: {uses: sft, model: start, data: ./chats.jsonl, steps: 4, log_every: 1}
"""


def test_metrics_reach_every_tracker(tmp_path: Path, chats: Path) -> None:
    (tmp_path / "tracked.yaml").write_text(RECIPE)
    result = run(tmp_path / "tracked.yaml", store=tmp_path / "s")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    key = result.artifact("tuned").key
    folder = Store.at(tmp_path / "s").tracking("tracked", "tuned", key)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((folder / "run.json").read_text())
    assert (about["outcome"], about["key"], about["config"]["steps"]) == ("done", key, 4)
    assert about["facts"]["training"]["steps"] == 4
    assert about["environment"]["libraries"]["torch"]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [1, 2, 3, 4]
    board = EventAccumulator(str(folder))
    board.Reload()
    assert {event.step: round(event.value, 4) for event in board.Scalars("loss")} == {
        step: round(loss, 4) for step, loss in losses.items()
    }


def test_orpo_learns_to_prefer(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    pairs = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for text in ("one", "two", "three", "four")
    ]
    data = tiny_dataset(tmp_path, pairs)
    config = {"steps": 25, "learning_rate": 3e-3, "beta": 0.5, "log_every": 5}
    tuned = run_stage(tmp_path, "orpo", config, inputs={"model": model, "data": data})
    assert tuned.kind == "model"
    assert tuned.facts["training"]["loss_last"] < 0.3 * tuned.facts["training"]["loss_first"]
    talks = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in pairs]
    held = tiny_dataset(tmp_path, talks, split="test")
    report = run_stage(tmp_path, "evaluate", inputs={"model": tuned, "against": [model], "data": held})
    assert report.facts["scores"]["exact_match"] == 1.0
    assert report.facts["against"][0]["scores"]["exact_match"] == 0.0
    talk = tiny_dataset(tmp_path, talks)
    adapter = run_stage(tmp_path, "sft", {"adapter": "lora", "steps": 1}, inputs={"model": model, "data": talk})
    further = run_stage(tmp_path, "orpo", {**config, "steps": 2}, inputs={"model": adapter, "data": data})
    assert further.kind == "adapter"
    assert further.facts["base"] == model.key
