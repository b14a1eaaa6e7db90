"""The shell stays light: no verb that only looks loads torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from luthier.recipe.document import parse

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "trl", "peft")


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plan", "small.yaml"], ["schema"]])
def test_looking_loads_nothing_heavy(recipe: Path, tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom luthier.cli.main import main\n"
        f"sys.argv = ['luthier', *{arguments!r}]\n"
        f"main()\nprint([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_schema_accepts_every_recipe_and_page(cli) -> None:
    schema = json.loads(cli("schema").stdout)
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    # The recipes of pages about plugins use the page's own plugin, which is not installed here.
    pages = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "plugins"]
    for page in [ROOT / "README.md", *pages]:
        texts += re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    # A recipe that requires a plugin is only valid where it is installed.
    texts = [text for text in texts if "\nrequires:" not in text]
    # mergekit's files are YAML too.
    texts = [text for text in texts if "\nmerge_method:" not in text]
    assert len(texts) >= 6
    for text in texts:
        jsonschema.validate(parse(text, "recipe.yaml").value, schema)


def test_the_schema_accepts_what_recipes_accept(recipe: Path, cli) -> None:
    schema = json.loads(cli("schema").stdout)
    value = yaml.safe_load(recipe.read_text())
    jsonschema.validate(value, schema)
    value["stages"]["merged"] = {"uses": "merge", "config": "mergekit.yml"}
    jsonschema.validate(value, schema)
    value["stages"]["more"]["method"]["cuont"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema)


@pytest.mark.parametrize(
    ("text", "types"),
    [("F16", ["F16"]), ("F16,Q8_0", ["F16", "Q8_0"]), ("[F16]", ["F16"]), ("[F16, Q8_0]", ["F16", "Q8_0"])],
)
def test_one_value_is_enough_for_a_list_wherever_its_key_stands(tmp_path: Path, text: str, types: list[str]) -> None:
    from luthier.artifacts.store import Store
    from luthier.cli.do import _config

    given = ("format.uses=gguf", f"format.types={text}")
    assert _config("export", given, Store.at(tmp_path))["format"] == {"uses": "gguf", "types": types}
    # A key that holds one word, or a list, takes the word as it is.
    adapter = _config("sft", ("adapter.uses=lora", "adapter.target_modules=all-linear"), Store.at(tmp_path))["adapter"]
    assert adapter == {"uses": "lora", "target_modules": "all-linear"}
