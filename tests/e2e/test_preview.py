"""``luthier preview``: what is shown is what is trained on, and nothing is trained for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from luthier import run
from luthier.artifacts.store import Store
from luthier.modeling.loading import load_tokenizer
from luthier.running.preview import preview

RECIPE = """\
luthier: 1
name: seen
stages:
  chats: {uses: data, source: chats.jsonl, split: {validation: 0.2}}
  more: {uses: data, source: more.jsonl}
  pairs: {uses: data, source: pairs.jsonl, columns: {question: prompt}}
  blank: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
  tuned: {uses: sft, model: blank, data: [chats, more], batch_size: 4, steps: 1, max_length: 64}
  liked: {uses: dpo, model: tuned, data: pairs, steps: 1}
  read: {uses: pretrain, model: tuned, data: chats, steps: 1, max_length: 32}
  file: {uses: export, model: liked}
"""


def luthier(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe; what one test has made is there for the next."""
    tmp_path = tmp_path_factory.mktemp("seen")
    chats = [talk(f"say {n}", f"{n}!") for n in range(30)]
    written = {
        "chats": chats,
        "more": [talk("go on", "and on"), talk("too long", "long " * 80)],
        "pairs": [{"question": f"which {n}?", "chosen": "this", "rejected": "that"} for n in range(3)],
    }
    for name, rows in written.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "seen.yaml").write_text(RECIPE)
    return tmp_path


def seen(folder: Path, stage: str, *options: str) -> dict[str, Any]:
    done = luthier(folder, "preview", "seen.yaml", stage, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows_are_shown_as_they_are_trained_and_nothing_is(folder: Path) -> None:
    told = luthier(folder, "preview", "seen.yaml", "tuned", "--rows", "2").stdout
    assert "say 0\u27e60!\u27e7" not in told
    assert "assistant\\n\u27e6" in told
    assert "\u27e6<|im_end|>\u27e7\u23f9" in told
    assert "left out: 1 x longer than max_length=64" in told
    assert "more: 1 rows" in told
    stages = {found.manifest["stage"] for key in Store(folder / ".luthier").stored_keys()
              if (found := Store(folder / ".luthier").find(key)) is not None}  # fmt: skip
    assert stages == {"chats", "more", "blank"}
    found = seen(folder, "tuned")
    (row, *_) = found["rows"]
    ids = [number for part in row[0]["parts"] for number in part["ids"]]
    result = run(folder / "seen.yaml", store=folder / ".luthier", only="tuned")
    assert result.exit_code == 0
    trained = result.artifact("tuned").facts["training"]
    text = load_tokenizer(result.artifact("blank")).decode(ids)
    assert text == "".join(part["text"] for part in trained["first_rows"][0])
    splits = found["splits"]
    assert splits["train"]["rows"] == trained["rows"]
    assert splits["train"]["trained"] == trained["tokens"]
    assert splits["train"]["sources"] == trained["sources"]
    assert found["left_out"] == trained["left_out"]
    assert found["steps"] == -(-trained["rows"] // 4)
    assert splits["validation"]["rows"] + splits["train"]["rows"] == 31


def test_pairs_and_blocks_are_shown_with_the_tokens_of_the_model_that_is_there(folder: Path) -> None:
    # A model that no other test has made.
    other = ("--set", "stages.tuned.steps=2")
    found = seen(folder, "liked", "--rows", "1", *other)
    assert found["instead"] == {"tuned": "blank"}
    assert ["".join(part["text"] for part in side["parts"] if part["trained"]) for side in found["rows"][0]] == [
        "this<|im_end|>",
        "that<|im_end|>",
    ]
    assert all(side["parts"][-1]["stop"] for side in found["rows"][0])
    block = seen(folder, "read", "--rows", "1", *other)["rows"][0][0]
    assert sum(block["documents"]) == sum(len(part["ids"]) for part in block["parts"]) == 32
    told = luthier(folder, "preview", "seen.yaml", "read", "--rows", "1", "--tokens", *other).stdout
    assert "'tuned' is not made yet: tokens are those of 'blank'" in told
    assert f"({' + '.join(map(str, block['documents']))} tokens of documents)" in told


@pytest.mark.parametrize(
    ("stage", "options", "code", "message"),
    [
        ("file", (), 2, "'file' (export) trains on no rows"),
        ("tunde", (), 2, "there is no stage 'tunde'"),
        ("tuned", ("--set", "stages.tuned.min_trained=0.99"), 1, "`min_trained` asks for 99.0%"),
        ("tuned", ("--set", "stages.tuned.max_long=0.4"), 1, "50.0% where `max_long` allows for 40.0%"),
        ("tuned", ("--set", "stages.tuned.on_long=fail"), 1, "are longer than max_length=64"),
        ("liked", ("--set", "stages.pairs.columns.question=answer"), 1, "rows are bad"),
    ],
)
def test_what_training_would_refuse_is_refused(
    folder: Path, stage: str, options: tuple[str, ...], code: int, message: str
) -> None:
    done = luthier(folder, "preview", "seen.yaml", stage, *options)
    assert message in done.stderr
    assert done.returncode == code


def test_a_preview_changes_nothing_for_the_run(folder: Path) -> None:
    from luthier import plan

    first = plan(folder / "seen.yaml", folder / ".luthier")
    preview(first, "liked", 1)
    again = plan(folder / "seen.yaml", folder / ".luthier").nodes["liked"]
    assert (again.status, again.key) == ("run", first.nodes["liked"].key)
