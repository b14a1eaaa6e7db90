"""The stage `lm_eval` gives the numbers of lm-evaluation-harness' own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from luthier.api import Artifact, DataError
from luthier.registry import default_registry
from luthier.reporting.statistics import wilson
from luthier.testing import run_stage, tiny_model

OFFERED = ["red", "blue", "green", "dark yellow"]
TASKS = {
    "colours": """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
""",
    "says": """\
task: says
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["!"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: letters, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "spoken": """\
task: spoken
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "tasks"
    folder.mkdir()
    rows = [{"question": f"What colour is thing {n}?", "choices": OFFERED, "label": (n * 7) % 4} for n in range(24)]
    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


def commanded(model: Artifact, tasks: Path, out: Path, *more: str) -> dict[str, Any]:
    """What the command `lm_eval` says of a model."""
    options = ["--model", "hf", "--model_args", f"pretrained={model.path},dtype=float32", "--device", "cpu"]
    options += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(out), *more]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.glob("**/results*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_numbers_are_those_of_the_command(tasks: Path, tmp_path: Path, chat: bool) -> None:
    model, other = tiny_model(tmp_path), tiny_model(tmp_path, seed=1)
    config = {"tasks": list(TASKS), "include": str(tasks), "chat": chat, "limit": 20}
    report = run_stage(tmp_path, "lm_eval", config, inputs={"model": model, "against": [other]})
    more = ["--limit", "20", *(["--apply_chat_template", "--fewshot_as_multiturn"] if chat else [])]
    theirs = commanded(model, tasks, tmp_path / "out", *more)
    facts = report.facts
    assert facts["scores"] == {
        "colours/acc": pytest.approx(theirs["colours"]["acc,none"]),
        "colours/acc_norm": pytest.approx(theirs["colours"]["acc_norm,none"]),
        "says/exact_match,letters": pytest.approx(theirs["says"]["exact_match,letters"]),
        "spoken/word_perplexity": pytest.approx(theirs["spoken"]["word_perplexity,none"], rel=1e-4),
    }
    ends = wilson(round(20 * facts["scores"]["colours/acc"]), 20)
    assert facts["intervals"]["colours/acc"] == [ends.low, ends.high]
    # What is no mean of rows has no interval, and is not compared row by row.
    assert "spoken/word_perplexity" not in facts["intervals"]
    assert facts["higher_is_better"]["spoken/word_perplexity"] is False
    assert facts["against"][0]["difference"]["colours/acc"]["rows"] == 20
    assert facts["task_versions"] == {"colours": "1.5", "says": "1.0", "spoken": "1.0"}
    assert facts["rows_by_metric"]["colours/acc"] == 20
    lines = [json.loads(line) for line in (report.path / "model.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    right = [line["scores"]["colours/acc"] for line in lines if line["task"] == "colours"]
    assert sum(right) / 20 == pytest.approx(facts["scores"]["colours/acc"])
    asked = next(line["prompt"] for line in lines if line["task"] == "colours")
    assert ("<|im_start|>" in asked) == chat


def test_few_shot_and_tasks_that_are_unknown(tasks: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    config: dict[str, Any] = {"tasks": "colours", "include": str(tasks), "limit": 3, "few_shot": 2, "batch_size": 1}
    report = run_stage(tmp_path, "lm_eval", config, inputs={"model": model})
    line = json.loads((report.path / "model.jsonl").read_text().splitlines()[0])
    assert line["prompt"].count("What colour is thing") == 3
    with pytest.raises(DataError, match="knows no task 'shapes'"):
        run_stage(tmp_path, "lm_eval", {**config, "tasks": ["colours", "shapes"]}, inputs={"model": model})


def gate(require: dict[str, str], facts: dict[str, Any]) -> list[tuple[bool, Any]]:
    uses = {"uses": "lm_eval", "model": "m", "against": ["base"], "tasks": "t", "require": require}
    made: Any = default_registry().use("stage", uses).config
    return [(found.ok, found.value) for found in made.gates(facts)]


def test_gates_name_task_and_metric() -> None:
    facts = {
        "scores": {"t/acc": 0.6},
        "intervals": {"t/acc": [0.5, 0.7]},
        "against": [{"scores": {"t/acc": 0.5}}],
    }
    assert gate({"t/acc": ">= base + 0.05"}, facts) == [(True, 0.6)]
    assert gate({"t/acc.lower": ">= base"}, facts) == [(True, 0.5)]
    assert gate({"t/acc.change": ">= 0.3"}, facts) == [(False, pytest.approx(0.2))]
    assert gate({"t/other": ">= 0", "t/other.change": ">= 0", "t/acc": ">= 0.7"}, facts) == [
        (False, None),
        (False, None),
        (False, 0.6),
    ]


def test_an_export_gives_no_probabilities() -> None:
    config: Any = default_registry().use("stage", {"uses": "lm_eval", "model": "m", "tasks": "t"}).config
    assert config.kind_problems({"model": ["export"], "against": []}) == [
        "`model` is an export, which gives no probabilities: name the model it was made from"
    ]
    assert config.kind_problems({"model": ["adapter"], "against": ["model"]}) == []
