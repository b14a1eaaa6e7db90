"""Processes that metrics can kill: what a model wrote is computed in them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

OUTPUT = 64 * 2**20
"""The most bytes that a program may write into a file."""
USUAL_START = 0.03
"""Seconds that an interpreter takes to start on a usual machine."""
START = 30.0
"""Seconds that libraries may take to be imported."""
_PROGRAM = """
import os, resource
for _limit, _most in (
    (resource.RLIMIT_AS, {memory}), (resource.RLIMIT_FSIZE, {output}), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_CPU, {cpu}),
):
    resource.setrlimit(_limit, (_most, _most))
exec(compile({code!r}, "answer", "exec"), {{"__name__": "__main__"}})
os._exit({done})
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    how: Literal["done", "failed", "stopped"]
    said: str = ""
    """The last line of its errors."""


def run_python(code: str, seconds: float, memory: int) -> Ended:
    """Run a Python program in a process of its own, without this one's environment, in an empty folder. It is done
    where it comes to its end: one that leaves before, as by ``sys.exit(0)``, has failed.

    Args:
        code: The program.
        seconds: After how many seconds it is killed, with its process group; what it started has no more time of
            the processor, either.
        memory: The most memory that it may take, in bytes.
    """
    # What no program says by accident.
    done = secrets.choice(range(100, 250))
    text = _PROGRAM.format(memory=memory, output=OUTPUT, cpu=ceil(seconds) + 1, done=done, code=code)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            process.communicate(text.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ended("stopped")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode == done:
            return Ended("done")
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        return Ended("failed", lines[-1] if lines else f"it ended with {process.returncode}")


def slowness() -> float:
    """How many times as long as on a usual machine a program takes here, at least 1: how long an interpreter takes to
    start, the second time."""
    took = 0.0
    for _ in range(2):
        begun = time.monotonic()
        run_python("", START, 2**30)
        took = time.monotonic() - begun
    return max(1.0, took / USUAL_START)


class Helper:
    """A process that answers one question at a time, and is killed where it takes too long.

    Args:
        module: What it runs: it reads a line of JSON, and writes one.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer.

        Args:
            question: Anything that JSON holds.
            seconds: How long it may take.

        Raises:
            TimeoutError: it took longer.
            OSError: the process ended.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._line(START)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise
        return json.loads(self._line(seconds))

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            until = time.monotonic() + seconds
            while not said.endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    self.close()
                    raise TimeoutError(f"no answer within {seconds:g} s")
                part = os.read(self._process.stdout.fileno(), 2**16)
                if not part:
                    self.close()
                    raise OSError("the process ended")
                said += part
        return said

    def close(self) -> None:
        """Kill the process; the next question starts another."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None


def serve(answer: Callable[[Any], Any]) -> None:
    """What the module of a `Helper` runs.

    Args:
        answer: Makes the answer to a question.
    """
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    # What libraries print is no answer.
    os.dup2(2, 1)
    out.write(b"ready\n")
    for line in sys.stdin.buffer:
        out.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
