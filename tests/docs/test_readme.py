"""The README's recipe runs as it is written, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_recipe_and_commands_of_the_readme_work(tmp_path: Path, chats: Path, cli) -> None:
    text = README.read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "support.yaml").write_text(recipe)
    commands = re.findall(r"^    luthier (.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    verbs = [command.split()[0] for command in commands]
    assert verbs == ["plan", "run", "show", "report", "chat", "diff", "plugins", "plugin"]
    for command in commands:
        done = cli(*shlex.split(command))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "tuned    = cached" in cli("run", "support.yaml").stdout


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"make (\w+)", README.read_text(encoding="utf-8"))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
