"""A store that was damaged, removed, locked or cut off: nothing wrong is taken from it, nobody waits in vain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from luthier import plan, run
from luthier.api import StoreError
from luthier.artifacts.completeness import check_complete
from luthier.artifacts.digest import digest_file
from luthier.artifacts.store import Store
from luthier.cli.clean import garbage
from luthier.running import lock
from luthier.running.lock import Lock, is_held

FUZZ = Path(__file__).parents[1] / "fuzz.py"


@pytest.fixture
def made(recipe: Path, tmp_path: Path) -> Store:
    """A store with a run of the small recipe."""
    assert run(recipe, store=tmp_path / ".luthier").exit_code == 0
    return Store.at(tmp_path / ".luthier")


def key_of(store: Store, stage: str) -> str:
    return next(artifact.key for artifact in store if artifact.manifest["stage"] == stage)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewritten(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], bool]] = {
    "missing": ("train.parquet", Path.unlink, True),
    "cut": ("train.parquet", lambda path: path.write_bytes(path.read_bytes()[:-1]), True),
    "flipped": ("train.parquet", flipped, False),
    "one_more": ("train.parquet", lambda path: shutil.copyfile(path, path.with_name("validation.parquet")), True),
    "manifest_cut": ("manifest.json", lambda path: path.write_text(path.read_text()[:-20]), True),
    "manifest_list": ("manifest.json", lambda path: path.write_text("[]"), True),
    "manifest_empty": ("manifest.json", lambda path: path.write_text(""), True),
    "manifest_facts": ("manifest.json", rewritten(facts={"schema": "text", "rows": {"train": 3}}), True),
    "manifest_gone": ("manifest.json", Path.unlink, True),
}
"""What happens to which file, and whether names, sizes and manifests alone tell of it."""


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_said_and_made_again(recipe: Path, made: Store, cli, name: str) -> None:
    file, spoil, at_once = DAMAGES[name]
    key = key_of(made, "chats")
    right = digest_file(made.folder(key) / "train.parquet")
    spoil(made.folder(key) / file)
    node = plan(recipe, made).nodes["chats"]
    assert node.status == ("run" if at_once else "cached")
    assert ("damaged" in node.reason) is at_once
    told = cli("verify-store")
    assert told.returncode == 1
    assert key[:12] in told.stdout
    assert "2 artifacts, 1 damaged" in told.stdout
    assert cli("show").returncode == 0
    # What is read is looked at; the stage behind it is not run on what is left.
    asked = recipe.read_text().replace("count: 20", "count: 21")
    recipe.write_text(asked)
    result = run(recipe, store=made)
    assert result.exit_code == 0
    assert result.stages["chats"].outcome == "done"
    assert digest_file(made.folder(key) / "train.parquet") == right
    assert cli("verify-store").returncode == 0


def test_a_damaged_result_that_nothing_reads_is_not_cached(recipe: Path, made: Store) -> None:
    flipped(made.folder(key_of(made, "more")) / "train.parquet")
    result = run(recipe, store=made)
    assert result.exit_code == 0
    assert {name: stage.outcome for name, stage in result.stages.items()} == {"chats": "cached", "more": "done"}


def test_damaged_artifacts_are_not_used_from_the_command_line(made: Store, cli) -> None:
    flipped(made.folder(key_of(made, "more")) / "train.parquet")
    told = cli("show", "small/more")
    assert told.returncode == 1
    assert "this artifact is damaged: train.parquet has another content" in told.stderr
    assert cli("verify-store", "--remove").returncode == 0
    assert cli("verify-store").stdout == "1 artifacts, 0 damaged\n"


def test_a_store_that_is_removed_under_a_stage_gets_no_result(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("count: 20", "count: 60000").replace("[100, 999]", "[1, 99999999]"))
    store = Store.at(tmp_path / ".luthier")

    def remove(event: dict[str, Any]) -> None:
        if event["event"] == "stage_started" and event["stage"] == "more":
            # While it is at work.
            threading.Timer(0.3, lambda: shutil.rmtree(store.artifacts)).start()

    result = run(recipe, store=store, listeners=[remove])
    assert result.exit_code == 1
    assert "removed or damaged while 'more' read it" in str(result.stages["more"].error)
    assert not list(store)
    assert run(recipe, store=store).exit_code == 0


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        ("dataset", {"rows": {"train": 3}}, "no file for the split 'train'"),
        ("model", {"tokenizer": "x"}, "config.json is missing"),
        ("adapter", {"tokenizer": "x"}, "adapter_config.json is missing"),
        ("export", {"files": {"F16": {"file": "model-F16.gguf"}}}, "no file model-F16.gguf"),
    ],
)
def test_only_whole_artifacts_are_stored(tmp_path: Path, kind: Any, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        check_complete(kind, tmp_path, facts)


# -- locks -----------------------------------------------------------------------------------------


def taken(folder: Path, content: str) -> tuple[bool, list[str]]:
    """Whether a lock with such a file is taken at once, and what is said."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    (folder / "k.lock").write_text(content)
    mine = Lock(folder, "k", said.append)
    got = mine.acquire()
    if got:
        mine.release()
    return got, said


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '"x"', '{"host": 1}', '{"host": "h", "pid": -1, "started": 0}',
     '{"host": "h", "pid": "x", "started": 0}', '{"host": "h", "pid": 5, "started": "NaN"}', "[" * 100_000],
)  # fmt: skip
def test_a_lock_file_that_says_nobody_is_taken_over(tmp_path: Path, content: str) -> None:
    assert not is_held(tmp_path / "k.lock")
    got, said = taken(tmp_path / "locks", content)
    assert got
    assert said == ["taking over the lock that an unknown process left behind"]
    (tmp_path / "k.lock").write_text(content)
    assert not is_held(tmp_path / "k.lock")


def test_a_process_that_ended_holds_no_lock_even_if_nobody_waited_for_it(tmp_path: Path) -> None:
    import psutil

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = {"host": socket.gethostname(), "pid": child.pid, "started": psutil.Process(child.pid).create_time()}
        assert not taken(tmp_path / "locks", json.dumps(owner))[0]
        child.kill()
        for _ in range(200):
            if psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.01)
        got, said = taken(tmp_path / "locks", json.dumps(owner))
        assert got
        assert f"process {child.pid}" in said[0]
    finally:
        child.kill()
        child.communicate()


def test_another_machine_is_gone_when_its_lock_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_AFTER", 0.3)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    path = tmp_path / "k.lock"
    path.write_text('{"host": "elsewhere", "pid": 5, "started": 1.0}')
    tomorrow = time.time() + 86_400
    os.utime(path, (tomorrow, tomorrow))
    mine = Lock(tmp_path, "k", lambda text: None)
    assert not mine.acquire()
    time.sleep(0.2)
    # It gave a sign: its clock is ahead, and it is there.
    os.utime(path, (tomorrow + 5, tomorrow + 5))
    assert not mine.acquire()
    time.sleep(0.2)
    assert not mine.acquire()
    time.sleep(0.2)
    assert not is_held(path)
    assert mine.acquire()
    mine.release()


# -- what a kill leaves, and what a full disk does ------------------------------------------------


def test_scratch_of_what_is_finished_is_removed(recipe: Path, made: Store) -> None:
    key = key_of(made, "more")
    left = made.work(key) / "checkpoint-3"
    left.mkdir(parents=True)
    (left / "luthier-whole").touch()
    assert made.work(key) in garbage(made)
    assert run(recipe, store=made).exit_code == 0
    assert not made.work(key).exists()


def test_cut_lines_and_odd_files_are_no_tracebacks(recipe: Path, made: Store, cli) -> None:
    (folder,) = made.runs.iterdir()
    events = folder / "events.jsonl"
    events.write_text(events.read_text()[:-30] + '\nnull\n[]\n{"event": 3}\n{"event": "stage_finished"}\n')
    told = cli("show", folder.name)
    assert told.returncode == 0
    assert "5 lines cannot be read" in told.stdout
    for content in ("[]", "3", "", '{"chats": 3}', '{"chats": {"inputs": 3}}', '{"more": {"inputs": {"data": 3}}}'):
        (made.root / "refs" / "small.json").write_text(content)
        for command in (["show", "small/more"], ["plan", "small.yaml"], ["clean", "--dry-run"]):
            done = cli(*command)
            assert "Traceback" not in done.stderr, (content, command)
            assert done.returncode in (0, 1)


def test_a_store_that_is_a_link_to_nowhere_is_a_message(recipe: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    done = cli("run", recipe.name, "--store", "link")
    assert done.returncode == 1
    assert "the store cannot be written" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("wait", [0.15, 0.4, 0.8, 1.5])
def test_signals_end_with_130_from_the_first_moment_on(
    recipe: Path, tmp_path: Path, number: signal.Signals, wait: float
) -> None:
    recipe.write_text(recipe.read_text().replace("count: 20", "count: 60000").replace("[100, 999]", "[1, 99999999]"))
    # Its first moment is when the program itself begins, whatever Python needs before.
    # A shell may have started these tests in the background, where programs are told to ignore Ctrl-C.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); print('up', file=sys.stderr, "
        "flush=True); from luthier.cli.entry import main; main()"
    )
    command = [sys.executable, "-c", code, "run", recipe.name]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert child.stderr is not None
    assert child.stderr.readline() == "up\n"
    time.sleep(wait)
    child.send_signal(number)
    time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors


def test_a_hundred_odd_inputs_of_each_kind_end_with_messages() -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--count", "400", "--seed", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 cases" in done.stdout
    assert "0 failures" in done.stdout
