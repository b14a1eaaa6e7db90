"""Fixtures: a small recipe, its data, and the command line as a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing is written to the user's own folders.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="luthier-trackio-"))
os.environ.setdefault("WANDB_MODE", "offline")

# The first example of a process pays for imports: these tests do not measure speed.
settings.register_profile("luthier", deadline=None)
settings.load_profile("luthier")

LONG = ("recipes", "docs", "e2e")
"""Folders of tests that run whole recipes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: else one process is left with them when the others are done."""
    items.sort(key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG))


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `luthier` in the test's folder and returns how it ended."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from luthier.cli.main import main; main()", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    return call


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A data file with ten conversations."""
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, chats: Path) -> Path:
    """Reads the ten conversations and adds twenty from a template."""
    path = tmp_path / "small.yaml"
    path.write_text(
        """\
luthier: 1
name: small
stages:
  more:
    uses: augment
    data: chats
    method:
      uses: template
      count: 20
      slots: {n: {range: [100, 999]}}
      templates:
        - messages:
            - {role: user, content: "count to {{ n }}"}
            - {role: assistant, content: "{{ n }}"}
  chats:
    uses: data
    source: chats.jsonl
    split: {test: 0.2}
""",
        encoding="utf-8",
    )
    return path


ORACLES = "LUTHIER_ORACLES"
"""A folder for environments with other programs: set, the comparisons run, and what is missing is installed there."""


@pytest.fixture(scope="session")
def environment() -> Callable[..., Path]:
    """Gives the Python of an environment with some packages, made once; skips where none was asked for."""
    folder = os.environ.get(ORACLES)
    if not folder:
        pytest.skip(f"set {ORACLES} to a folder to compare with other programs (installing them takes minutes)")

    def made(name: str, *packages: str) -> Path:
        place = Path(folder) / name
        python = place / "bin" / "python"
        if not (place / ".ready").exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            # torch first: what depends on it must find the pinned one.
            for package in packages:
                subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
            (place / ".ready").touch()
        return python

    return made
