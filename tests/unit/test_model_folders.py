"""Model folders are read as transformers reads them, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from luthier.api import ModelError
from luthier.artifacts.models import model_facts
from luthier.artifacts.tensors import (
    model_tensors,
    safetensors_header,
    stray_files,
    tensor_headers,
    weight_files,
    with_true_ties,
)
from luthier.artifacts.texts import chat_template, chat_templates, read_vocabulary, special_tokens, take_chat_templates
from safetensors.torch import save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three tensors in one file."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    save(path, {EMBEDDING: torch.arange(12.0).view(4, 3), "model.norm.weight": torch.ones(3)})
    return path


def save(path: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, path / name, metadata={"format": "pt"})


def index(path: Path, where: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_two_sets_of_weights_are_refused_and_named(folder: Path) -> None:
    save(folder, {EMBEDDING: torch.zeros(4, 3)}, "model-00001-of-00001.safetensors")
    assert stray_files(folder) == ["model-00001-of-00001.safetensors"]
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    index(folder, {EMBEDDING: "model-00001-of-00001.safetensors"})
    with pytest.raises(ModelError, match=r"two sets of weights: model\.safetensors, .* model\.safetensors\.index"):
        tensor_headers(folder)
    # An index of the one file says nothing else.
    index(folder, {EMBEDDING: "model.safetensors", "model.norm.weight": "model.safetensors"})
    assert set(tensor_headers(folder)) == {EMBEDDING, "model.norm.weight"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": "s1.safetensors", "b": "s2.safetensors"}, None),
        ({"a": "s1.safetensors", "b": "s1.safetensors"}, "says that b is in s1"),
        ({"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"}, "says that c is in s2"),
        ({"a": "s1.safetensors", "b": "s3.safetensors"}, "lacks the shards s3"),
        ({"a": "s1.safetensors", "b": "../s2.safetensors"}, "names no file beside it"),
        ({"a": "twice.safetensors", "b": "s1.safetensors"}, "a is in two files"),
    ],
)
def test_an_index_names_what_its_shards_have(folder: Path, where: dict[str, str], message: str | None) -> None:
    (folder / "model.safetensors").unlink()
    save(folder, {"a": torch.ones(2)}, "s1.safetensors")
    save(folder, {"b": torch.ones(2)}, "s2.safetensors")
    save(folder, {"a": torch.ones(2), "b": torch.ones(2)}, "twice.safetensors")
    index(folder, where)
    if message is None:
        assert set(tensor_headers(folder)) == {"a", "b"}
    else:
        with pytest.raises(ModelError, match=message):
            tensor_headers(folder)


def test_weights_under_another_name_are_not_guessed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*, only consolidated\.safetensors"):
        tensor_headers(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header: header[EMBEDDING].pop("shape"),
        lambda header: header[EMBEDDING].pop("data_offsets"),
        lambda header: header[EMBEDDING].pop("dtype"),
        lambda header: header[EMBEDDING].update(shape=[4, -3]),
        lambda header: header[EMBEDDING].update(shape=[4, 4]),
        lambda header: header[EMBEDDING].update(shape="4"),
        lambda header: header[EMBEDDING].update(data_offsets=[0]),
        lambda header: header[EMBEDDING].update(data_offsets=[4, 52]),
        lambda header: header.update({EMBEDDING: []}),
        lambda header: header.update(more={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    ],
)
def test_odd_headers_are_messages(folder: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spoil(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelError, match=r"header (says|describes|gives|does not describe)"):
        safetensors_header(path)


@pytest.mark.parametrize("said", [True, None, False])
@pytest.mark.parametrize("alike", [True, False])
def test_the_config_says_of_the_head_what_the_weights_say(folder: Path, said: bool | None, alike: bool) -> None:
    embedding = torch.arange(12.0).view(4, 3)
    save(folder, {EMBEDDING: embedding, HEAD: embedding.clone() if alike else embedding + 1})
    config = {"model_type": "llama"} | ({} if said is None else {"tie_word_embeddings": said})
    (folder / "config.json").write_text(json.dumps(config))
    own = model_tensors(folder)
    dropped = alike and said is not False
    assert (HEAD in own) is not dropped
    settled = with_true_ties(config, tensor_headers(folder), own)
    assert settled["tie_word_embeddings"] is dropped
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if not alike:
        with pytest.raises(ModelError, match="the weights have a head of its own"):
            model_facts(folder)


def test_templates_are_found_where_transformers_finds_them(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    settings = folder / "tokenizer_config.json"
    for inside, expected in (
        (None, {}),
        ("a", {"default": "a"}),
        (named, {"default": "a", "tool_use": "b"}),
        ({"default": "a"}, {"default": "a"}),
    ):
        settings.write_text(json.dumps({"eos_token": {"content": "</s>"}, "chat_template": inside}))
        assert chat_templates(folder) == expected
        assert chat_template(folder) == expected.get("default")
    assert special_tokens(folder) == {"eos_token": "</s>"}
    settings.write_text(json.dumps({"chat_template": named}))
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": "of another"}))
    take_chat_templates(folder, out)
    assert chat_templates(out) == {"default": "a", "tool_use": "b"}
    # Files win over what the config has.
    (folder / "chat_template.jinja").write_text("c")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert chat_templates(folder) == {"default": "c", "rag": "d"}
    (folder / "chat_template.jinja").unlink()
    assert chat_template(folder) is None
    settings.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    (folder / "additional_chat_templates" / "rag.jinja").unlink()
    with pytest.raises(ModelError, match="neither a text nor a list of named templates"):
        chat_templates(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no `model`"),
        ({"model": {"vocab": {"a": {}}}}, "the id of the token 'a' is '{}'"),
        ({"model": {"vocab": {"a": True}}}, "the id of the token 'a'"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}, "not listed as in a tokenizer"),
        ({"model": {"vocab": 3}}, "not listed as in a tokenizer"),
        ({"model": {"vocab": {"a": 0}, "merges": [["a"]]}}, "no pair of tokens"),
    ],
)
def test_odd_vocabularies_are_messages(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        read_vocabulary(path)
