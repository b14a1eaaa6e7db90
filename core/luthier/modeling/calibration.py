"""The text that quantization calibrates on: data that is named, or what the model was tuned on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.api.artifact import Artifact
from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.artifacts.datasets import Split, read_split
from luthier.artifacts.rows import conversations, schema_of, trainable_text
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.text import encode_text, render

SEED = 20
"""The order of the rows is the same in every run."""


def tuned_on(model: Artifact) -> list[Artifact]:
    """The datasets that the model, or the models that it was merged from, were trained on last.

    Empty where the store no longer has them, or the model came from outside.
    """
    found: dict[str, Artifact] = {}
    waiting = [model]
    seen: set[str] = set()
    while waiting:
        artifact = waiting.pop(0)
        if artifact.key in seen:
            continue
        seen.add(artifact.key)
        inputs: Mapping[str, Sequence[str]] = artifact.manifest.get("inputs", {})
        parents = [parent for keys in inputs.values() for parent in artifact.siblings(keys)]
        data = [parent for parent in parents if parent.kind == "dataset" and texts_in(parent)]
        found |= {parent.key: parent for parent in data}
        if not data:
            waiting += [parent for parent in parents if parent.kind in ("model", "adapter")]
    return list(found.values())


def texts_in(data: Artifact) -> bool:
    """Whether a dataset holds text that a model is trained on."""
    return trainable_text(data.facts["schema"]) and bool(data.facts["rows"].get("train"))


def text_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as the model was shown it: in its chat template, or as it is.

    Raises:
        DataError: rows of this schema hold nothing that a model says.
    """
    schema = schema_of(row)
    if not trainable_text(schema):
        raise DataError(f"rows of the schema {schema} have no answers to calibrate on", hint="name other data")
    return row["text"] if schema == "text" else render(tokenizer, conversations(row)[0])


def texts_of(datasets: Sequence[Artifact], tokenizer: PreTrainedTokenizerBase, split: Split = "train") -> Iterator[str]:
    """The rows of all datasets' split as text, in an order that mixes them."""
    rows = [row for data in datasets for row in read_split(data, split)]
    random.Random(SEED).shuffle(rows)
    encoder = ChatEncoder(tokenizer)
    for row in rows:
        # A rendered text says no longer which names of control tokens are those of the template.
        if "text" in row or encoder.holds_control(conversations(row)[0]) is None:
            yield text_of(row, tokenizer)


def blocks_of(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, *, exactly: bool = False
) -> list[list[int]]:
    """Token ids of texts, each text a block of at most `length`, until there are so many tokens.

    Args:
        exactly: Refuse fewer than `tokens`.

    Raises:
        DataError: there are no texts, or fewer tokens than asked for.
    """
    blocks: list[list[int]] = []
    have = 0
    for text in texts:
        if have >= tokens:
            break
        ids = encode_text(tokenizer, text).input_ids[: min(length, tokens - have)]
        if ids:
            blocks.append(ids)
            have += len(ids)
    if have < (tokens if exactly else 1):
        raise DataError(
            f"the calibration data has {have} tokens, {tokens} were asked for",
            hint="name more data, or ask for fewer tokens",
        )
    return blocks


def digest_of(blocks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a manifest says of calibration data: how much it was, and the sha256 of the token ids."""
    text = "\n".join(" ".join(map(str, block)) for block in blocks)
    return {"blocks": len(blocks), "tokens": sum(map(len, blocks)), "sha256": hashlib.sha256(text.encode()).hexdigest()}
