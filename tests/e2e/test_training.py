"""Training stages on a tiny model made from nothing: hand-over, labels, resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from luthier import Recipe, run
from luthier.artifacts.digest import digest_file
from luthier.artifacts.json_files import read_json
from luthier.artifacts.store import Store
from luthier.artifacts.texts import chat_template

RECIPE = """\
luthier: 1
name: tiny
seed: 5
stages:
  chats: {uses: data, source: chats.jsonl}
  blank:
    uses: init
    data: [chats]
    vocab_size: 300
    hidden_size: 32
    intermediate_size: 64
    layers: 2
    heads: 2
    kv_heads: 1
    dtype: float32
  base: {uses: pretrain, model: blank, data: [chats], steps: 4, learning_rate: 1e-3, max_length: 64, log_every: 1}
  full: {uses: sft, model: base, data: chats, steps: 6, learning_rate: 1e-3, log_every: 1, save_every: 2}
  light: {uses: sft, model: base, data: chats, steps: 4, learning_rate: 1e-2, log_every: 1, adapter: {uses: dora, r: 2}}
  further: {uses: sft, model: light, data: chats, steps: 2, learning_rate: 1e-2, log_every: 1}
  four-bit: {uses: sft, model: base, data: chats, steps: 2, log_every: 1, adapter: {uses: qlora, r: 2}}
  soup: {uses: merge, models: [base, full], method: {uses: ties, density: 0.5}, base: blank}
"""


def test_a_stage_does_not_depend_on_what_ran_before_it(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    alone = run(tmp_path / "tiny.yaml", store=tmp_path / "s", only=["light"]).artifact("light")
    first = digest_file(alone.path / "adapter_model.safetensors")
    shutil.rmtree(alone.path)
    # In the same worker, `full` draws random numbers before `light` does.
    recipe = Recipe.load(tmp_path / "tiny.yaml", overrides=["stages.light.after=[full]"])
    again = run(recipe, store=tmp_path / "s", only=["light"])
    assert again.stages["full"].outcome == again.stages["light"].outcome == "done"
    assert digest_file(again.artifact("light").path / "adapter_model.safetensors") == first


@pytest.fixture
def tiny(tmp_path: Path, chats: Path) -> Path:
    """A recipe that makes, trains and merges a model of some ten thousand parameters."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_text_files_and_lineage_survive_every_stage(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, store=tmp_path / "s")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    blank = result.artifact("blank")
    for name in ("base", "full", "light", "further", "four-bit", "soup"):
        made = result.artifact(name)
        assert chat_template(made.path) == chat_template(blank.path)
        assert made.facts["stop_tokens"] == ["<|im_end|>"]
        assert made.facts["tokenizer"] == blank.facts["tokenizer"]
        theirs = read_json(made.path / "generation_config.json")
        assert theirs["eos_token_id"] == read_json(blank.path / "generation_config.json")["eos_token_id"]
    base = result.artifact("base")
    assert [result.artifact(name).kind for name in ("light", "further", "four-bit")] == ["adapter"] * 3
    assert {result.artifact(name).base.key for name in ("light", "further", "four-bit")} == {base.key}
    full = result.artifact("full").facts["training"]
    assert full["loss_last"] < full["loss_first"]


def test_a_killed_training_resumes_to_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    import psutil

    text = RECIPE.replace("steps: 6, ", "steps: 400, ").replace("save_every: 2", "save_every: 20")
    tiny.write_text(text[: text.index("  light")])
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "tiny.yaml", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "metrics" and event["stage"] == "full" and event["step"] >= 30:
            break
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    process.communicate(timeout=60)
    assert process.returncode == 1
    again: list[dict[str, object]] = []
    resumed = run(tiny, store=tmp_path / ".luthier", listeners=[again.append])
    assert resumed.stages["base"].outcome == "cached"
    assert any("resuming from checkpoint-" in str(event.get("message")) for event in again)
    straight = run(tiny, store=tmp_path / "straight")
    weights = [item.artifact("full").manifest["files"]["model.safetensors"] for item in (resumed, straight)]
    assert weights[0] == weights[1]
    assert not Store.at(tmp_path / ".luthier").work(resumed.artifact("full").key).exists()


def test_sigint_while_training_leaves_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("steps: 6, ", "steps: 100000, ").replace("save_every: 2", "save_every: 50000")
    tiny.write_text(text[: text.index("  light")])
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "tiny.yaml", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "metrics" and event["stage"] == "full":
            break
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list((tmp_path / ".luthier" / "work").glob("*/checkpoints/checkpoint-*/trainer_state.json"))
