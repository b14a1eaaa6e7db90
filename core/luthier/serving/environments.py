"""Environments of their own for heavy tools whose pins would conflict with Luthier's: made once, when the user says so.

They are below ``~/.cache/luthier/environments``, or where ``LUTHIER_ENVIRONMENTS`` says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.api.errors import PluginError, StageError

VARIABLE = "LUTHIER_ENVIRONMENTS"
READY = ".ready"


@dataclass(frozen=True, slots=True)
class Environment:
    """A tool with an environment of its own.

    Attributes:
        name: What users call it.
        about: What it is for.
        packages: What is installed, one after the other: what must be found by the next comes first.
    """

    name: str
    about: str
    packages: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is; other packages, another folder."""
        root = os.environ.get(VARIABLE)
        place = Path(root) if root else Path.home() / ".cache" / "luthier" / "environments"
        digest = hashlib.sha256("\n".join(self.packages).encode()).hexdigest()[:8]
        return place / f"{self.name}-{digest}"

    @property
    def ready(self) -> bool:
        return (self.folder / READY).exists()

    @property
    def python(self) -> Path:
        """Its interpreter.

        Raises:
            PluginError: it has not been made yet.
        """
        if not self.ready:
            raise self.missing()
        return self.folder / "bin" / "python"

    def missing(self) -> PluginError:
        """The error that says how to make it."""
        return PluginError(
            f"{self.name} is not installed: it gets an environment of its own, because its packages "
            "would conflict with others, or slow every start",
            hint=f"luthier doctor --install {self.name}",
        )

    def install(self, say: Callable[[str], None]) -> None:
        """Make it; one that was begun before is made anew.

        Raises:
            StageError: a package cannot be installed.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        for package in self.packages:
            say(f"installing {package}")
            command = [str(self.folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2]
                raise StageError(f"{package} cannot be installed: {last}", hint="is there a network?")
        (self.folder / READY).touch()

    def lines(self, script: Path, arguments: Sequence[str], log: Path) -> Iterator[str]:
        """Run a script there, yielding what it prints; everything is written to `log` as well.

        Raises:
            PluginError: the environment has not been made yet.
            StageError: the script fails.
        """
        # Without the script's own folder: a file beside it may be called as a library is.
        command = [str(self.python), "-P", str(script), *arguments]
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
            raise StageError(f"{self.name} ended with exit code {process.returncode}: {last}", where=str(log))


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "auto-round",
            "rounding that learns which way to round, for the quantizers awq and gptq",
            ("torch==2.13.0", "transformers==5.23.0", "auto-round==0.16.1"),
        ),
        Environment(
            "torchao",
            "the quantizer torchao",
            ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "torchao==0.18.0"),
        ),
    )
}
"""By name; each is made by ``luthier doctor --install NAME``."""
