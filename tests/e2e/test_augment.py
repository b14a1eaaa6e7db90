"""Augmentation as a user runs it: a real server, a run that is killed, and answers that are not asked for again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_api import chat_api
from luthier.testing import tiny_model

LUTHIER = str(Path(sys.executable).parent / "luthier")
RECIPE = """\
luthier: 1
name: asked
stages:
  questions: {{uses: data, source: questions.jsonl}}
  answered:
    uses: augment
    data: questions
    keep_original: false
    bad_rows: {{drop_up_to: 1}}
    method: {{uses: answer, max_new_tokens: 24, generator: {{uses: openai, url: "{url}", at_once: {at_once}}}}}
"""


def questions(folder: Path, count: int) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "?"}]}
            for n in range(count)]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LUTHIER, "run", "asked.yaml"], cwd=folder, capture_output=True, text=True, check=False)


def test_a_run_that_is_killed_asks_for_no_answer_again(tmp_path: Path) -> None:
    questions(tmp_path, 20)

    def answer(request: dict[str, object]) -> str:
        time.sleep(0.3)
        return "A fine answer."

    with chat_api(answer) as server:
        (tmp_path / "asked.yaml").write_text(RECIPE.format(url=server.url, at_once=2))
        process = subprocess.Popen([LUTHIER, "run", "asked.yaml"], cwd=tmp_path, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(server.requests) < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        assert 8 <= len(server.requests) < 20
        done = run(tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        # Those that were under way when it was killed are the only ones to be asked for again.
        assert 20 <= len(server.requests) <= 22
        assert set(server.texts) == {f"Question {n}?" for n in range(20)}
        # The lock of a worker that is no more is taken over.
        assert re.search(r"answered +\S+ done", done.stdout)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that `luthier serve` serves."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model(folder / "models")
    recipe = f"luthier: 1\nname: s\nstages:\n  m: {{uses: base, source: {model.path}}}\n"
    (folder / "s.yaml").write_text(recipe)
    subprocess.run([LUTHIER, "run", "s.yaml"], cwd=folder, check=True, capture_output=True)
    process = subprocess.Popen(
        [LUTHIER, "serve", "s/m", "--port", "0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
    finally:
        process.terminate()
        process.wait()


def test_a_model_of_ours_is_a_teacher_over_http(tmp_path: Path, served: str) -> None:
    questions(tmp_path, 3)
    (tmp_path / "asked.yaml").write_text(RECIPE.format(url=served, at_once=2))
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 answers" in done.stdout + done.stderr
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob(".luthier/store/*/manifest.json")]
    (facts,) = [found["facts"] for found in manifests if found["stage"] == "answered"]
    assert dict(facts["ledger"])["were made by 'answer'"] == 3
