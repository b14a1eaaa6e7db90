"""Environments with other programs, for comparisons with them; made once, and only when they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ASKED = "LUTHIER_ORACLES"
"""A folder for the environments: set, the comparisons run, and what is missing is installed there."""


@pytest.fixture(scope="session")
def environment() -> Callable[..., Path]:
    """Gives the Python of an environment with some packages."""
    folder = os.environ.get(ASKED)
    if not folder:
        pytest.skip(f"set {ASKED} to a folder to compare with other programs (installing them takes minutes)")

    def made(name: str, *packages: str) -> Path:
        place = Path(folder) / name
        python = place / "bin" / "python"
        if not (place / ".ready").exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
            (place / ".ready").touch()
        return python

    return made
