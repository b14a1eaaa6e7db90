"""Separate environments for heavy tools whose pins would conflict with Luthier's: made once, when the user says so.

They are below ``~/.cache/luthier/environments``, or where ``LUTHIER_ENVIRONMENTS`` says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from luthier.api.errors import PluginError, StageError
from luthier.api.serving import ToolEnvironment

VARIABLE = "LUTHIER_ENVIRONMENTS"
READY = ".ready"


def folder_of(tool: ToolEnvironment) -> Path:
    """Where a tool's environment is; other packages, another folder."""
    root = os.environ.get(VARIABLE)
    place = Path(root) if root else Path.home() / ".cache" / "luthier" / "environments"
    digest = hashlib.sha256("\n".join(tool.packages).encode()).hexdigest()[:8]
    return place / f"{tool.name}-{digest}"


def is_ready(tool: ToolEnvironment) -> bool:
    """Whether it has been made."""
    return (folder_of(tool) / READY).exists()


def python_of(tool: ToolEnvironment) -> Path:
    """Its interpreter.

    Raises:
        PluginError: it has not been made yet.
    """
    if not is_ready(tool):
        raise missing(tool)
    return folder_of(tool) / "bin" / "python"


def missing(tool: ToolEnvironment) -> PluginError:
    """The error that says how to make it."""
    return PluginError(
        f"{tool.name} is not installed: it needs its own environment, because its packages would conflict with "
        "others, or slow every start",
        hint=f"luthier doctor --install {tool.name}",
    )


def install(tool: ToolEnvironment, say: Callable[[str], None]) -> None:
    """Make it; an unfinished one is made again.

    Raises:
        StageError: a package cannot be installed.
    """
    folder = folder_of(tool)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for package in tool.packages:
        say(f"installing {package}")
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise StageError(f"{package} cannot be installed: {last}", hint="is there a network?")
    (folder / READY).touch()


def run_script(tool: ToolEnvironment, script: Path, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Run a script there, yielding what it prints; everything is written to `log` as well.

    Raises:
        PluginError: the environment has not been made yet.
        StageError: the script fails.
    """
    # Without the script's own folder: a file beside it may be called as a library is.
    command = [str(python_of(tool)), "-P", str(script), *arguments]
    # Nothing of this process's own paths gets into the other environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    last = ""
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                last = line.strip() or last
                yield line
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        raise StageError(f"{tool.name} ended with exit code {process.returncode}: {last}", where=str(log))
