"""One plugin of each kind is written, installed with pip, tested by its own tests, used in a recipe, and removed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from luthier.api import KINDS as registered

KINDS = tuple(sorted(registered))

RECIPE = """\
luthier: 1
name: plugged
requires: [luthier-plugin-tiny-merge-method>=0.1]
executor: {uses: tiny-executor, slots: 2, niceness: 1}
trackers: [tiny-tracker]
stages:
  asked: {uses: data, source: questions.jsonl}
  chats: {uses: data, source: chats.jsonl}
  held: {uses: data, source: chats.jsonl, split: test}
  long: {uses: tiny-stage, data: chats, characters: 1}
  more: {uses: augment, data: long, method: tiny-augmenter}
  base: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
  tuned:
    uses: sft
    model: base
    data: more
    adapter: {uses: tiny-adapter, r: 2}
    steps: 2
    allow_leakage: &why the plugins are tested, not the model
  other:
    uses: sft
    model: base
    data: [more, asked]
    steps: 2
    optimizer: tiny-optimizer
    regularizers: [tiny-regularizer]
    allow_leakage: *why
  pairs: {uses: data, source: pairs.jsonl}
  preferred:
    uses: dpo
    model: other
    data: pairs
    objective: {uses: tiny-objective, margin: 2}
    steps: 2
    allow_leakage: *why
  merged: {uses: merge, models: [tuned, preferred], method: {uses: tiny-merge-method, pull: 0.2}}
  small: {uses: quantize, model: merged, method: {uses: tiny-quantizer, largest_kl: 1.0}}
  file: {uses: export, model: merged, format: {uses: tiny-exporter, dtype: bfloat16}}
  quality: {uses: evaluate, model: merged, against: file, data: held, metrics: [tiny-metric], max_new_tokens: 4}
"""


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="class")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one installed plugin of each kind."""
    folder = tmp_path_factory.mktemp("plugins")
    for kind in KINDS:
        code = "from luthier.cli.main import main; main()"
        name = f"tiny-{kind}".replace("_", "-")
        subprocess.run([sys.executable, "-c", code, "plugin", "new", name, "--kind", kind], cwd=folder, check=True)
    names = [path.name for path in folder.iterdir()]
    pip("install", "--no-deps", "--no-build-isolation", *(str(folder / name) for name in names))
    try:
        yield folder
    finally:
        pip("uninstall", "-y", *names)


class TestInstalled:
    """While the plugins are installed."""

    def test_their_own_tests_pass(self, plugins: Path) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        tests = [str(path / "tests") for path in plugins.iterdir()]
        done = subprocess.run([*command, *tests], cwd=plugins, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "30 passed" in done.stdout

    def test_they_are_listed_and_conform(self, plugins: Path, cli) -> None:
        listed = json.loads(cli("plugins", "--json").stdout)["components"]
        mine = {item["kind"]: item for item in listed if item["provider"].startswith("luthier-plugin-tiny")}
        assert sorted(mine) == sorted(KINDS)
        assert mine["merge_method"]["provider"] == "luthier-plugin-tiny-merge-method 0.1.0"
        checked = cli("plugin", "check", "tiny-merge-method")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert "ok      it behaves on a small example" in checked.stdout

    def test_a_recipe_uses_all_of_them(self, plugins: Path, cli, chats: Path, tmp_path: Path) -> None:
        rows = [
            {"prompt": "say 1", "chosen": "1!", "rejected": "2!"},
            {"prompt": "say 3", "chosen": "3!", "rejected": "?"},
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "questions.jsonl").write_text('{"question": "say 5", "answer": "5!"}')
        (tmp_path / "plugged.yaml").write_text(RECIPE)
        done = cli("run", "plugged.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        manifest = json.loads(cli("show", "plugged/long", "--json").stdout)
        assert manifest["component"]["provider"] == "luthier-plugin-tiny-stage 0.1.0"


def test_once_removed_a_recipe_says_what_is_missing(chats: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "plugged.yaml").write_text(RECIPE)
    done = cli("plan", "plugged.yaml")
    assert done.returncode == 2
    assert "pip install 'luthier-plugin-tiny-merge-method>=0.1'" in done.stderr
    assert "there is no stage 'tiny-stage'" in done.stderr
