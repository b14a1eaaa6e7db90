"""Every page of the docs is run as it is written: files are saved, commands are executed, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = sorted(path for path in DOCS.rglob("*.md") if "reference" not in path.parts)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_works_as_it_is_written(page: Path, tmp_path: Path) -> None:
    installed: list[str] = []
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    # The files of a page may stand below the command that reads them.
    later = [block for block in blocks if block[0] in ("jsonl", "yaml")]
    for language, text in later:
        save(tmp_path, language, text)
    try:
        for language, text in blocks:
            if language == "python":
                save(tmp_path, language, text)
            elif language == "sh":
                for command in text.strip().splitlines():
                    execute(command, tmp_path, installed)
            else:
                assert language in ("jsonl", "yaml"), f"{page.name} has a block of {language}, which nothing runs"
    finally:
        if installed:
            subprocess.run([sys.executable, "-m", "pip", "-q", "uninstall", "-y", *installed], check=True)


def save(folder: Path, language: str, text: str) -> None:
    """A block whose first line is ``# path`` is that file."""
    first, _, rest = text.partition("\n")
    assert first.startswith("# "), f"a block of {language} does not name its file"
    path = folder / first.removeprefix("# ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rest, encoding="utf-8")


def execute(command: str, folder: Path, installed: list[str]) -> None:
    """Run a command with this environment's programs; nothing is fetched from an index."""
    words = command.split()
    if words[0] == "pip":
        assert words[1:3] == ["install", "-e"]
        installed.append(words[3])
        command = f"python -m pip install -q --no-deps --no-build-isolation -e {words[3]}"
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    there = {**os.environ, "PATH": programs}
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False, env=there)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_reference_is_up_to_date() -> None:
    namespace: dict[str, object] = {"__name__": "generate", "__file__": str(DOCS / "generate.py")}
    exec(compile((DOCS / "generate.py").read_text(encoding="utf-8"), "generate.py", "exec"), namespace)
    pages = namespace["PAGES"]
    assert isinstance(pages, dict)
    for name, make in pages.items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == make(), "run `python docs/generate.py`"
