"""The templates in Modelfiles, rendered by Go itself, beside what the models' own templates give."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from luthier_plugins.gguf.modelfile import FORMATS, SPOKEN

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var given struct {
		Template string
		Messages []Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("prompt").Parse(given.Template))
	if err := parsed.Execute(os.Stdout, given); err != nil {
		panic(err)
	}
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    subprocess.run([go, "build", "-o", "render", "main.go"], cwd=folder, check=True)
    return folder / "render"


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_go_gives_the_prompts_that_are_compared_with_jinja(known, program: Path) -> None:
    for messages in SPOKEN:
        given = json.dumps({"Template": known.go, "Messages": messages})
        done = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True)
        assert done.stdout == known.gives(messages)
