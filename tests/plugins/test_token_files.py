"""Tokens on disk are the tokens of the rows, made once for all that would make the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from luthier.api import Artifact, DataError
from luthier.artifacts.datasets import iter_rows, read_split, row_at
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_tokenizer
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier.training import token_files
from luthier.training.encoding import EncodedRow, encode_row
from luthier.training.token_files import Labelling, TokenRows, token_file

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n} " * (n % 5)},
            {"role": "assistant", "content": f"{n}!"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"{n}." * (1 + n % 3)},
        ]
    }
    for n in range(1, 40)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": CHATS,
    "preference": [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:2],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for row in CHATS
    ],
    "labelled": [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:2], "label": n % 3 > 0}
        for n, row in enumerate(CHATS)
    ],
    "text": [{"text": f"The number {n} is no {n + 1}. " * (1 + n % 4)} for n in range(30)],
}


def labelling(model: Artifact, **more: Any) -> Labelling:
    return Labelling(model.path, tuple(model.facts["stop_token_ids"]), None, **{"of": "answers", **more})


def made(folder: Path, model: Artifact, data: Artifact, how: Labelling) -> Sequence[EncodedRow]:
    return token_file(data, "train", how, TestContext(folder))


@pytest.mark.parametrize("schema", ROWS)
@pytest.mark.parametrize("processes", [1, 2])
def test_they_are_the_tokens_of_the_rows(
    tmp_path: Path, schema: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_model(tmp_path), tiny_dataset(tmp_path, ROWS[schema])
    monkeypatch.setattr(token_files, "CHUNK", 7)
    monkeypatch.setattr(token_files, "AT_LEAST", 1 if processes > 1 else 10**9)
    monkeypatch.setattr(token_files, "_processes", lambda: processes)
    found = made(tmp_path / "c", model, data, labelling(model))
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    right = [encode_row(encoder, row) for row in read_split(data, "train")]
    assert list(found) == right
    assert len(found) == len(ROWS[schema])
    assert found.lengths.tolist() == [len(row) for row in right]  # type: ignore[attr-defined]
    assert found.targets.tolist() == [row.targets for row in right]  # type: ignore[attr-defined]
    chosen = TokenRows([found, found], [np.array([3, 1]), np.array([0])])  # type: ignore[list-item]
    assert [chosen[place] for place in range(3)] == [right[3], right[1], right[0]]
    with pytest.raises(IndexError):
        chosen[3]


def test_a_conversation_of_several_sequences_is_one_row(tmp_path: Path) -> None:
    model, data = tiny_model(tmp_path), tiny_dataset(tmp_path, CHATS)
    found = made(tmp_path / "c", model, data, labelling(model, answers="apart"))
    assert len(found) == len(CHATS)
    assert all(len(row.completions) == 2 for row in found)


def test_rows_that_cannot_be_used_are_counted_with_their_numbers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    bad = {"messages": [{"role": "user", "content": "only asked"}]}
    data = tiny_dataset(tmp_path, [*CHATS[:3], bad, *CHATS[3:5], bad])
    found: Any = made(tmp_path / "c", model, data, labelling(model))
    assert len(found) == 5
    assert found.numbers.tolist() == [0, 1, 2, 4, 5]
    assert found.bad.count == 2
    assert [example[0] for example in found.bad.examples] == [4, 7]
    assert "only asked" in found.bad.examples[0][1]


def files_in(store: Path) -> set[str]:
    return {path.name for path in (store / "cache" / "tokens").iterdir()}


def test_stages_that_would_make_the_same_share_them(tmp_path: Path) -> None:
    model, data = tiny_model(tmp_path), tiny_dataset(tmp_path, CHATS)
    step = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    inputs = {"model": model, "data": [data]}
    tuned = run_stage(tmp_path, "sft", step, inputs=inputs)
    first = files_in(tmp_path)
    assert len(first) == 1
    # Neither the length of rows, nor other weights, nor an adapter changes the tokens ...
    run_stage(tmp_path, "sft", {**step, "max_length": 900, "adapter": "lora"}, inputs=inputs)
    run_stage(tmp_path, "sft", step, inputs={**inputs, "model": tuned})
    assert files_in(tmp_path) == first
    # ... but other answers, whole documents, another template and other rows do.
    run_stage(tmp_path, "sft", {**step, "answers": "last"}, inputs=inputs)
    run_stage(tmp_path, "pretrain", {**step, "max_length": 64}, inputs=inputs)
    run_stage(tmp_path, "sft", step, inputs={**inputs, "data": [tiny_dataset(tmp_path, CHATS[:7])]})
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    source = tmp_path / "copy"
    shutil.copytree(model.path, source)
    (source / "manifest.json").unlink()
    opened = "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    (source / "chat_template.jinja").write_text(turns + opened)
    other = run_stage(tmp_path, "base", {"source": str(source)})
    run_stage(tmp_path, "sft", step, inputs={**inputs, "model": other})
    assert len(files_in(tmp_path)) == 5


def test_what_was_left_half_written_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model(tmp_path), tiny_dataset(tmp_path, CHATS)

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_targets", broken)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "c", model, data, labelling(model))
    assert not list((tmp_path / "c" / "cache" / "tokens").iterdir())
    assert len(made(tmp_path / "c", model, data, labelling(model))) == len(CHATS)


@pytest.mark.parametrize("name", ["tokens.arrow", "facts.json"])
def test_files_that_were_cut_off_are_made_anew(tmp_path: Path, name: str) -> None:
    model, data = tiny_model(tmp_path), tiny_dataset(tmp_path, CHATS)
    whole = list(made(tmp_path / "c", model, data, labelling(model)))
    (file,) = (tmp_path / "c" / "cache" / "tokens").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    context = TestContext(tmp_path / "c")
    assert list(token_file(data, "train", labelling(model), context)) == whole
    assert any("damaged" in text for text in context.warnings)


def test_rows_come_from_disk_in_pieces_and_by_number(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, CHATS)
    pieces = list(iter_rows(data, "train", 10))
    assert [len(piece) for piece in pieces] == [10, 10, 10, 9]
    assert [row for piece in pieces for row in piece] == read_split(data, "train")
    assert row_at(data, "train", 17) == read_split(data, "train")[17]
    with pytest.raises(IndexError):
        row_at(data, "train", 39)
    assert list(iter_rows(data, "test", 10)) == []


def test_a_row_whose_weight_is_no_number_is_a_bad_row(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    assert encode_row(encoder, {**CHATS[0], "weight": 2.5}).weight == 2.5
    for odd in (-1.0, float("nan"), "much", True):
        with pytest.raises(DataError, match="weight"):
            encode_row(encoder, {**CHATS[0], "weight": odd})


def test_messages_say_which_of_them_are_trained(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    messages: list[dict[str, Any]] = [dict(message) for message in CHATS[4]["messages"]]
    both = encode_row(encoder, {"messages": messages})
    messages[1]["train"] = False
    second = encode_row(encoder, {"messages": messages})
    assert second.completions[0].input_ids == both.completions[0].input_ids
    last = encode_row(encoder, {"messages": messages}, "last")
    assert second.completions == last.completions
    messages[3]["train"] = False
    with pytest.raises(DataError, match="no turn of the assistant"):
        encode_row(encoder, {"messages": messages})
