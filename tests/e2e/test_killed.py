"""The worker is killed in every kind of stage; running again goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from luthier.artifacts.store import Store

RECIPE = """\
luthier: 1
name: killed
stages:
  chats: {uses: data, source: chats.jsonl, split: {test: 0.2}}
  pairs: {uses: data, source: pairs.jsonl}
  more:
    uses: augment
    data: chats
    method:
      uses: template
      count: 3
      slots: {n: {range: [1, 9]}}
      templates: [{messages: [{role: user, content: "{{ n }}"}, {role: assistant, content: "{{ n }}"}]}]
  blank: {uses: init, data: [more], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
  grown: {uses: pretrain, model: blank, data: [more], steps: 3, max_length: 64}
  tuned: {uses: sft, model: grown, data: more, steps: 3}
  preferred: {uses: dpo, model: tuned, data: pairs, steps: 3}
  odds: {uses: orpo, model: tuned, data: pairs, steps: 3}
  soup: {uses: merge, models: [preferred, odds]}
  quality: {uses: evaluate, model: soup, data: chats, max_new_tokens: 4}
  file: {uses: export, model: soup}
"""
STAGES = ["chats", "pairs", "more", "blank", "grown", "tuned", "preferred", "odds", "soup", "quality", "file"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_in_each_stage_loses_only_that_stage(chats: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say 1", "chosen": "1!", "rejected": "2!"}, {"prompt": "say 3", "chosen": "3!", "rejected": "?"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "killed.yaml").write_text(RECIPE)
    store = Store.at(tmp_path / ".luthier")
    for done, victim in enumerate(STAGES):
        code, errors = run_and_kill(tmp_path, victim)
        assert code == 1
        assert "SIGKILL" in errors
        # A stage may be quicker than the signal, which then ends the next one.
        made = {artifact.manifest["stage"] for artifact in store}
        assert made in (set(STAGES[:done]), set(STAGES[: done + 1])), victim
        assert not list(store.locks.glob("*.lock"))
    code, errors = run_and_kill(tmp_path, None)
    assert code == 0, errors
    assert {artifact.manifest["stage"] for artifact in store} == set(STAGES)


def run_and_kill(folder: Path, victim: str | None) -> tuple[int, str]:
    """Run the recipe; kill the worker while it is in the stage `victim`."""
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "killed.yaml", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    messages: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        messages.append(event.get("message", ""))
        if event["event"] == "stage_started" and event["stage"] == victim:
            # The worker starts with the first stage that is not cached.
            children = psutil.Process(process.pid).children()
            while not children:
                children = psutil.Process(process.pid).children()
            children[0].kill()
    process.wait(timeout=60)
    return process.returncode, "\n".join(messages)
