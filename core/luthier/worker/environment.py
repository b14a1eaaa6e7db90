"""What manifests and trackers record of the machine and its software."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("luthier", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "gguf",
             "xllamacpp", "mergekit")  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, platform, command line and git commit; no names of users, no variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": _versions(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git_commit(),
    }


@cache
def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
