"""The verbs beside `run` and `plan`, as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.artifacts.store import Store
from luthier.cli.clean import garbage

RECIPE = """\
luthier: 1
name: small
stages:
  chats: {uses: data, source: chats.jsonl}
  blank: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
  tuned: {uses: sft, model: blank, data: chats, steps: 80, learning_rate: 1e-2, adapter: lora}
  file: {uses: export, model: tuned}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a recipe was run."""
    folder = tmp_path_factory.mktemp("done")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 4
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "small.yaml").write_text(RECIPE)
    assert run(folder / "small.yaml", store=folder / ".luthier").exit_code == 0
    return folder


def luthier(folder: Path, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, input=text, timeout=240, check=False)


def test_show_prints_facts_and_lineage(done: Path) -> None:
    told = luthier(done, "show", "small/file").stdout
    assert "export" in told
    assert "model: tuned (adapter" in told
    assert "data: chats (dataset" in told
    listed = luthier(done, "show").stdout
    (run_id,) = [line.removeprefix("run ") for line in listed.splitlines() if line.startswith("run ")]
    events = luthier(done, "show", run_id).stdout
    assert "tuned: finished" in events
    assert "ended with exit code 0" in events
    manifest = json.loads(luthier(done, "show", "small/tuned", "--json").stdout)
    assert manifest["kind"] == "adapter"
    missing = luthier(done, "show", "small/nothing")
    assert missing.returncode == 1
    assert "no artifact answers to 'small/nothing'" in missing.stderr


@pytest.mark.parametrize("stage", ["tuned", "file"])
def test_chat_works_with_an_adapter_and_a_file(done: Path, stage: str) -> None:
    asked = luthier(done, "chat", f"small/{stage}", "--ask", "hi", "--max-new-tokens", "8")
    assert asked.returncode == 0, asked.stderr
    question, answer = asked.stdout.splitlines()
    assert question == "> hi"
    talked = luthier(done, "chat", f"small/{stage}", "--max-new-tokens", "8", text="hi\n\n")
    assert answer
    assert answer in talked.stdout


def test_chat_with_a_dataset_is_refused(done: Path) -> None:
    asked = luthier(done, "chat", "small/chats", "--ask", "hi")
    assert asked.returncode == 1
    assert "a dataset cannot be used for chat" in asked.stderr


def test_do_runs_one_stage_and_copies_it_out(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    arguments = ("models=small/blank,small/tuned", "method.uses=slerp", "method.t=0.4", "--out", str(out))
    made = luthier(done, "do", "merge", *arguments)
    assert made.returncode == 0, made.stderr
    assert (out / "model.safetensors").exists()
    assert json.loads((out / "manifest.json").read_text())["config"]["method"] == {"uses": "slerp", "t": 0.4}
    again = luthier(done, "do", "merge", *arguments)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    wrong = luthier(done, "do", "merge", "models=small/blank,small/tuned", "method.uses=slrp")
    assert wrong.returncode == 2
    assert "did you mean 'slerp'?" in wrong.stderr


def test_show_says_what_was_trained_and_marks_it_in_the_first_rows(done: Path) -> None:
    shown = luthier(done, "show", "small/tuned").stdout
    assert "a gradient came to each" in shown
    assert "tokens per second" in shown
    assert "logits differ by" in shown
    assert "row 1: " in shown
    assert "<|im_end|>\u27e7" in shown
    assert "first_rows" not in shown


def test_clean_keeps_what_the_last_run_needs(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    store = Store.at(folder / ".luthier")
    (folder / "small.yaml").write_text(RECIPE.replace("steps: 80", "steps: 2"))
    assert luthier(folder, "run", "small.yaml").returncode == 0
    before = {artifact.key for artifact in store}
    dry = luthier(folder, "clean", "--dry-run")
    assert dry.stdout.splitlines()[-1].startswith("would free")
    assert {artifact.key for artifact in store} == before
    assert luthier(folder, "clean").returncode == 0
    kept = {artifact.manifest["stage"] for artifact in store}
    assert kept >= {"chats", "blank", "tuned", "file"}
    assert len(list(store)) < len(before)
    statuses = {node.status for node in plan(Recipe.load(folder / "small.yaml"), store).nodes.values()}
    assert statuses == {"cached"}


def test_clean_removes_the_cache_when_asked_and_what_is_half_written_in_it_always(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    cache = Store.at(folder / ".luthier").cache
    whole = list((cache / "tokens").iterdir())
    assert whole
    (cache / "tokens" / "new-abc").mkdir()
    (cache / "tokens" / "new-abc" / "tokens.arrow").write_bytes(b"half")
    assert luthier(folder, "clean").returncode == 0
    assert list((cache / "tokens").iterdir()) == whole
    assert "cache" in luthier(folder, "clean", "--cache", "--dry-run").stdout
    assert luthier(folder, "clean", "--cache").returncode == 0
    assert not cache.exists()
    assert luthier(folder, "run", "small.yaml").returncode == 0


def test_clean_leaves_a_run_alone_that_goes_on(done: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "s")
    seen: list[list[str]] = []

    def look(event: dict[str, object]) -> None:
        if event["event"] == "stage_started" and event["stage"] == "blank":
            seen.append([path.name for path in garbage(store)])

    result = run(done / "small.yaml", store=store, only=["blank"], listeners=[look])
    assert seen == [[]]
    assert result.exit_code == 0


def test_clean_frees_what_a_stage_made_that_the_recipe_has_no_more(chats: Path, tmp_path: Path) -> None:
    one = "luthier: 1\nname: two\nstages:\n  a: {uses: data, source: chats.jsonl}\n"
    (tmp_path / "more.jsonl").write_text(chats.read_text() * 2)
    (tmp_path / "two.yaml").write_text(one + "  b: {uses: data, source: more.jsonl}\n")
    store = Store.at(tmp_path / "s")
    dropped = run(tmp_path / "two.yaml", store=store).artifact("b")
    assert garbage(store) == []
    (tmp_path / "two.yaml").write_text(one)
    assert run(tmp_path / "two.yaml", store=store).exit_code == 0
    assert garbage(store) == [dropped.path]


def test_init_writes_a_recipe_that_plans(done: Path, tmp_path: Path) -> None:
    for name, row in (
        ("talks", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("texts", {"text": "a"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
        made = luthier(tmp_path, "init", f"{name}.jsonl")
        assert made.returncode == 0, made.stderr
        planned = luthier(tmp_path, "plan", f"{name}.yaml")
        assert planned.returncode == 0, planned.stderr
        assert "file" in planned.stdout
    again = luthier(tmp_path, "init", "talks.jsonl")
    assert again.returncode == 2


def test_doctor_names_versions_and_devices(done: Path) -> None:
    told = luthier(done, "doctor", "--json")
    found = json.loads(told.stdout)
    assert told.returncode == (1 if found["problems"] else 0)
    assert found["versions"]["torch"].startswith("2.")
    assert "threads" in found["devices"]
    assert found["store"]["artifacts"] >= 4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_for_that_shell(done: Path, shell: str) -> None:
    assert "_LUTHIER_COMPLETE" in luthier(done, "completion", shell).stdout


def test_debug_shows_the_traceback(done: Path) -> None:
    assert "Traceback" not in luthier(done, "run", "none.yaml").stderr
    assert "Traceback" in luthier(done, "--debug", "run", "none.yaml").stderr


def test_help_of_each_verb_shows_an_example(done: Path) -> None:
    from luthier.cli.main import VERBS

    for verb in VERBS:
        assert (
            f"Example: {'eval' if verb == 'completion' else f'luthier {verb}'}" in luthier(done, verb, "--help").stdout
        )


def test_init_writes_what_luthier_can_read_whatever_the_names(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    for name in ("donn\u00e9es.jsonl", "a: b #c.jsonl", "7.jsonl"):
        (tmp_path / name).write_text(f"{row}\n" * 3)
        assert luthier(tmp_path, "init", name, "--out", "sub/recipe.yaml").returncode == 0
        assert luthier(tmp_path, "plan", "sub/recipe.yaml").returncode == 0
        assert luthier(tmp_path, "init", name).returncode == 0
        assert luthier(tmp_path, "plan", f"{Path(name).stem}.yaml").returncode == 0
        shutil.rmtree(tmp_path / "sub")
    for text, message in ((row, "only one row"), ('{"chosen": "a", "rejected": "b"}\n' * 2, "no known format")):
        (tmp_path / "odd.jsonl").write_text(text)
        told = luthier(tmp_path, "init", "odd.jsonl")
        assert message in told.stderr
        assert told.returncode == 1


def test_the_end_of_piped_questions_is_no_interrupt(done: Path) -> None:
    told = luthier(done, "chat", "small/tuned", "--max-new-tokens", "2", text="hi")
    assert told.returncode == 0, told.stderr
    assert "has no variants" in luthier(done, "chat", "small/tuned", "--variant", "Q9", "--ask", "x").stderr


def test_places_that_are_none_are_messages(tmp_path: Path) -> None:
    for arguments in (("show", "/no/such"), ("chat", "/no/such"), ("do", "merge", "models=/no/such,/no/other")):
        told = luthier(tmp_path, *arguments)
        assert told.returncode in (1, 2)
        assert "Traceback" not in told.stderr
        assert "/no/such" in told.stderr
    assert "Invalid value for '--kind'" in luthier(tmp_path, "plugins", "--kind", "foo").stderr


def test_a_lock_without_an_owner_keeps_nothing(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "s")
    (store.work("k") / "out").mkdir(parents=True)
    store.locks.mkdir(parents=True)
    import os
    import socket

    import psutil

    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (store.locks / "k.lock").write_text(json.dumps(me))
    assert garbage(store) == []
    (store.locks / "k.lock").write_text(json.dumps({**me, "started": 1.0}))
    assert garbage(store) == [store.work("k")]
