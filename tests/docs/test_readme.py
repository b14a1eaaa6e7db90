"""The README's recipe runs as it is written, and its commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from luthier import run

README = Path(__file__).parents[2] / "README.md"
MODEL = """\
luthier: 1
name: model
stages:
  m: {uses: init, data: [./chats.jsonl], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
"""


def test_the_recipe_and_commands_of_the_readme_work(tmp_path: Path, chats: Path, cli) -> None:
    (tmp_path / "model.yaml").write_text(MODEL)
    made = run(tmp_path / "model.yaml", store=tmp_path / "s").artifact("m")
    shutil.copytree(made.path, tmp_path / "my-model")
    text = README.read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "support.yaml").write_text(recipe)
    commands = re.findall(r"^    luthier (.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    assert commands == ["plan support.yaml", "run support.yaml", "show", "plugins"]
    for command in commands:
        done = cli(*command.split())
        assert done.returncode == 0, done.stderr
    assert "tuned  cached" in " ".join(cli("run", "support.yaml").stdout.split("\n"))


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"make (\w+)", README.read_text(encoding="utf-8"))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
