"""What must not go wrong in a run: half-written checkpoints, sources that change, full disks, foreign artifacts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.api import ModelError, RecipeError, StageError
from luthier.artifacts.checkpoints import checkpoints
from luthier.artifacts.store import Store
from luthier.reporting.tables import describe
from luthier.testing import run_stage, tiny_dataset, tiny_model
from safetensors.torch import load_file, save_file

MAIN = [sys.executable, "-c", "from luthier.cli.main import main; main()"]
TUNED = """\
luthier: 1
name: tuned
stages:
  chats: {uses: data, source: chats.jsonl}
  blank: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
  tuned: {uses: sft, model: blank, data: chats, steps: 400, save_every: 20, batch_size: 2}
"""


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(TUNED)
    process = subprocess.Popen([*MAIN, "run", "tuned.yaml", "--json"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["stage"] == "tuned" and event["done"] >= 45:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    store = Store.at(tmp_path / ".luthier")
    node = plan(tmp_path / "tuned.yaml", store).nodes["tuned"]
    whole, _ = checkpoints(store.work(node.key))
    assert node.status == "resume"
    # As a kill during the save leaves it: some files are there, the last ones are not.
    later = whole[-1].with_name("checkpoint-390")
    later.mkdir()
    (later / "model.safetensors").write_bytes(b"half")
    done = subprocess.run([*MAIN, "run", "tuned.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-390 was only partly written" in done.stdout
    assert f"resuming from {whole[-1].name}" in done.stdout


def test_an_interrupt_that_comes_too_late_for_a_stage_still_ends_with_130(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(TUNED)

    def interrupt(event: dict) -> None:
        if event["event"] == "stage_finished" and event["stage"] == "chats":
            os.kill(os.getpid(), signal.SIGINT)

    result = run(tmp_path / "tuned.yaml", store=tmp_path / "s", listeners=[interrupt])
    assert result.stages["chats"].outcome == "done"
    assert result.stages["tuned"].outcome == "skipped"
    assert result.exit_code == 130


def test_a_source_that_changes_after_the_plan_is_not_stored_under_the_old_key(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(TUNED)
    made = plan(tmp_path / "tuned.yaml", tmp_path / "s")
    chats.write_text(chats.read_text().replace("say", "name"))
    result = run(made, only="chats")
    assert result.exit_code == 1
    assert "changed during the run" in str(result.stages["chats"].error)
    assert run(tmp_path / "tuned.yaml", store=tmp_path / "s", only="chats").exit_code == 0


def test_python_takes_names_and_refuses_unknown_ones(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(TUNED)
    with pytest.raises(RecipeError, match="did you mean 'chats'"):
        run(tmp_path / "tuned.yaml", store=tmp_path / "s", only=["chatz"])
    result = run(Recipe.load(tmp_path / "tuned.yaml"), store=tmp_path / "s", only="chats")
    assert list(result.stages) == ["chats"]
    with pytest.raises(StageError, match="it was not asked for"):
        result.artifact("tuned")
    again = [run(tmp_path / "tuned.yaml", store=tmp_path / "s", only="chats").id for _ in range(3)]
    assert len(set(again)) == 3, "runs within one second are different runs"


def test_an_artifact_from_outside_is_what_its_manifest_says(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "other")
    shutil.copytree(model.path, tmp_path / "model")
    recipe = {"luthier": 1, "stages": {"soup": {"uses": "merge", "models": ["./model", "./model"]}}}
    assert plan(Recipe.from_mapping(recipe, folder=tmp_path), tmp_path / "s").nodes["soup"].status == "run"
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights = {name: tensor * 1.5 for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model.safetensors of this artifact was changed"):
        plan(Recipe.from_mapping(recipe, folder=tmp_path), tmp_path / "s")
    # Somebody else's manifest makes a folder no artifact.
    (tmp_path / "model" / "manifest.json").write_text('{"name": "a web app"}')
    made = plan(Recipe.from_mapping(recipe, folder=tmp_path), tmp_path / "s")
    assert "base(./model)" in made.nodes


def test_an_adapter_leaves_its_store_with_the_model_it_sits_on(tmp_path: Path, cli) -> None:
    model = tiny_model(tmp_path / "other")
    rows = [{"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}]}] * 4
    data = tiny_dataset(tmp_path / "other", rows)
    shutil.copytree(model.path, tmp_path / "model")
    shutil.copytree(data.path, tmp_path / "rows")
    made = cli("do", "sft", "model=model", "data=rows", "adapter.r=4", "adapter=lora", "steps=1", "--out", "ad")
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "ad" / "manifest.json").read_text())["facts"]["r"] == 4
    asked = cli("chat", "ad", "--ask", "hi", "--max-new-tokens", "2")
    assert asked.returncode == 0, asked.stderr
    # In another store, what is made from it is whole too.
    merged = cli("do", "merge", "models=ad,ad", "--store", "third", "--out", "merged")
    assert merged.returncode == 0, merged.stderr
    again = cli("do", "sft", "model=ad", "data=rows", "steps=1", "--store", "fourth", "--out", "further")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "further" / "base" / "config.json").exists()


def test_a_disk_that_is_full_from_the_start_is_a_message(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(TUNED)

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = subprocess.run(
        [*MAIN, "run", "tuned.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=no_room
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "store" in done.stderr


def test_facts_that_a_plugin_forgot_are_named_and_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier_plugins.data.stage import Data

    path = tmp_path / "texts.txt"
    path.write_text("one\n\ntwo\n")
    for facts, message in (
        ({}, "lack schema, rows"),
        (None, "returned NoneType"),
        ({"schema": tmp_path, "rows": {}}, "not plain"),
    ):
        monkeypatch.setattr(Data, "run", lambda self, facts=facts: facts)
        with pytest.raises(StageError, match=message):
            run_stage(tmp_path / "s", "data", {"source": str(path)})
    assert not list(Store.at(tmp_path / "s"))


def test_whatever_is_in_a_manifest_can_be_shown(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    for kind in ("dataset", "model", "adapter", "export", "report"):
        bare = type(model)(model.key, kind, model.path, {"training": {}, "scores": {"x": None}}, model.manifest)
        assert describe(bare).startswith(kind)


def test_a_config_with_a_wrong_vocabulary_size_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    shutil.copytree(model.path, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    with pytest.raises(ModelError, match="says vocab_size 4"):
        run_stage(tmp_path / "s", "base", {"source": str(tmp_path / "model")})


@pytest.mark.parametrize(
    ("stage", "rows", "message"),
    [
        (
            {"uses": "evaluate", "model": "model", "data": "rows"},
            "text",
            "evaluate reads rows of the schema messages or preference, not text",
        ),
        (
            {"uses": "pretrain", "model": "model", "data": ["rows"]},
            "preference",
            "reads rows of the schema text or messages, not preference",
        ),
        ({"uses": "sft", "model": "model", "data": ["rows"]}, "text", "reads rows of the schema messages, not text"),
        ({"uses": "dpo", "model": "model", "data": "rows"}, "text", "reads rows of the schema preference, not text"),
    ],
    ids=lambda value: value["uses"] if isinstance(value, dict) else "",
)
def test_data_of_another_schema_is_a_message(tmp_path: Path, stage: dict, rows: str, message: str) -> None:
    raw = {"text": {"text": "a b"}, "preference": {"prompt": "a", "chosen": "b", "rejected": "c"}}[rows]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(raw)}\n" * 4)
    recipe = {
        "luthier": 1,
        "stages": {"model": {"uses": "base"}, "rows": {"uses": "data", "source": "rows.jsonl"}, "x": stage},
    }
    # The format that is recognised says it before anything runs.
    with pytest.raises(RecipeError, match=message):
        plan(Recipe.from_mapping(recipe, folder=tmp_path), tmp_path / "s")


def test_new_rows_keep_the_columns_of_the_old_ones_even_when_those_go(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "slice": "x"}
    data = tiny_dataset(tmp_path, [row])
    method = {
        "uses": "template",
        "count": 2,
        "slots": {"n": {"range": [1, 99]}},
        "templates": [
            {"slice": "y", "messages": [{"role": "user", "content": "{{ n }}"}, {"role": "assistant", "content": "c"}]}
        ],
    }
    made = run_stage(tmp_path, "augment", {"method": method, "keep_original": False}, inputs={"data": data})
    from luthier.artifacts.datasets import read_split

    assert [found["slice"] for found in read_split(made, "train")] == ["y", "y"]
