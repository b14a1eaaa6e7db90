"""The check of a written model by a separate process that loads it with transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gguf_models import make_model
from luthier.merging.load_check import load_check
from luthier.testing import tiny_model

FOUND = {"loaded": "memory", "forward": "finite"}


def run(given: str) -> str:
    """What the program prints."""
    command = [sys.executable, "-m", "luthier.merging.load_check"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_of_all_kinds_load_and_compute(tmp_path: Path) -> None:
    kinds = ["gemma3", "qwen2", "qwen3-moe", "deepseek-v3", "phi3-long"]
    assert [load_check(make_model(tmp_path / kind, kind)) for kind in kinds] == [FOUND] * len(kinds)


def test_the_program_checks_the_folder_that_it_is_given(tmp_path: Path) -> None:
    assert json.loads(run(f"{tiny_model(tmp_path).path}\n")) == FOUND


def test_a_folder_without_a_model_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    assert "problem" in json.loads(run(f"{tmp_path}\n"))


def test_a_merge_that_was_given_up_is_not_checked() -> None:
    assert run("") == ""
