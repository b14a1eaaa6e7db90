"""Models with different tokenizers: one vocabulary, and every model's rows moved to its places."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.api import ModelError
from luthier.artifacts.models import EMBEDDINGS, TensorHeader, carry_text_files, read_json
from luthier_plugins.merge.check import is_vocabulary
from luthier_plugins.merge.files import Scratch
from luthier_plugins.merge.layout import Inputs
from luthier_plugins.merge.reader import Source, dump_json
from torch import Tensor

TOKENIZER = "tokenizer.json"
SOURCES = "token_sources.json"
"""Which model each token comes from that the first one does not have."""
SAME = ("normalizer", "pre_tokenizer", "decoder")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Tokenizer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The merged model's tokens.

    Attributes:
        speaker: The model whose tokenizer it is, or is built on; its text files and special ids are taken.
        tokenizer: The content of ``tokenizer.json``.
        rows: Rows of the embedding.
        sources: For each token that the speaker does not have, the model it comes from.
    """

    speaker: Source
    tokenizer: Tokenizer
    rows: int
    sources: dict[str, str]

    def write(self, out: Path) -> None:
        """Write the tokenizer and what else belongs to the text."""
        carry_text_files(self.speaker.artifact.path, out)
        if self.sources:
            dump_json(out / TOKENIZER, self.tokenizer)
            dump_json(out / SOURCES, self.sources)

    def settle(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with this vocabulary's size and special ids."""
        ids = {key: self.speaker.config[key] for key in IDS if key in self.speaker.config}
        return {**config, **ids, "vocab_size": self.rows}


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of every token, added ones included."""
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    return vocabulary | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}


def vocabulary_of(choice: str, inputs: Inputs, speaker: Source | None) -> Vocabulary:
    """The joint vocabulary (``union``), or that of one model.

    Raises:
        ModelError: a tokenizer has no ``tokenizer.json``, or they are of different kinds.
    """
    lead = speaker or inputs.lead
    tokenizer = _read(lead)
    sources: dict[str, str] = {}
    if choice == "union":
        for other in inputs.all:
            if other is not lead:
                tokenizer = _joined(tokenizer, _read(other), lead, other, sources)
    return Vocabulary(lead, tokenizer, max(_rows(lead), max(tokens_of(tokenizer).values()) + 1), sources)


def _embedding(model: Source) -> str:
    name = next((name for name in model.headers if name.endswith(EMBEDDINGS)), None)
    if name is None:
        raise ModelError("no embedding was found whose rows could be moved", where=model.label)
    return name


def _rows(model: Source) -> int:
    return model.headers[_embedding(model)].shape[0]


def _read(model: Source) -> Tokenizer:
    path = model.artifact.path / TOKENIZER
    if not path.exists():
        raise ModelError(f"{model.label} has no {TOKENIZER}", where=str(model.artifact.path),
                         hint="load its tokenizer with transformers and save it again")  # fmt: skip
    tokenizer = read_json(path)
    if not isinstance(tokenizer["model"].get("vocab"), dict):
        raise ModelError(f"the tokenizer of {model.label} is a {tokenizer['model'].get('type')} model, which cannot be "
                         "joined", where=str(path), hint="merge models that share it")  # fmt: skip
    return tokenizer


def _joined(first: Tokenizer, second: Tokenizer, lead: Source, other: Source, sources: dict[str, str]) -> Tokenizer:
    """The first tokenizer with what only the second has: tokens behind its own, merges behind its own."""
    kinds = [first["model"].get("type"), second["model"].get("type")]
    odd = [key for key in SAME if first.get(key) != second.get(key)]
    if kinds[0] != kinds[1] or odd:
        what = f"their {odd[0]}" if odd else f"their models ({kinds[0]} and {kinds[1]})"
        raise ModelError(
            f"the tokenizers of {lead.label} and {other.label} cannot be joined: {what} differ",
            hint=f"choose one of them, as `tokenizer: {other.label}`",
        )
    known = tokens_of(first)
    joined = copy.deepcopy(first)
    following = max(known.values()) + 1
    added = {entry["content"]: entry for entry in second.get("added_tokens") or []}
    for token in sorted(tokens_of(second), key=tokens_of(second).__getitem__):
        if token in known:
            continue
        if token in added:
            joined.setdefault("added_tokens", []).append({**added[token], "id": following})
        else:
            joined["model"]["vocab"][token] = following
        sources[token] = other.label
        following += 1
    merges = joined["model"].get("merges")
    if merges is not None:
        seen = {_pair(merge) for merge in merges}
        merges.extend(merge for merge in second["model"]["merges"] if _pair(merge) not in seen)
    return joined


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def respell(inputs: Inputs, vocabulary: Vocabulary) -> Inputs:
    """Every model as if it had the vocabulary; models that are the same stay the same."""
    tokens = tokens_of(vocabulary.tokenizer)
    own = {id(model): {token: row for token, row in tokens_of(_read(model)).items() if row < _rows(model)}
           for model in inputs.all}  # fmt: skip
    # A token that a model lacks is read from the first that has it: the base, then the models in their order.
    order = inputs.all
    found: dict[int, Source] = {}
    for model in order:
        rows: list[tuple[Source, int]] = [(model, -1)] * vocabulary.rows
        for token, place in tokens.items():
            if token in own[id(model)]:
                rows[place] = (model, own[id(model)][token])
            else:
                having = (other for other in order if token in own[id(other)])
                rows[place] = next(((other, own[id(other)][token]) for other in having), (model, -1))
        # Rows of no token are padding. A model's own stand where it has such; else those of the model whose vocabulary
        # it is, so that nothing differs there; else zeros.
        taken = set(own[id(model)].values())
        for place in set(range(vocabulary.rows)) - set(tokens.values()):
            if place < _rows(model) and place not in taken:
                rows[place] = (model, place)
            elif place < _rows(vocabulary.speaker):
                rows[place] = (vocabulary.speaker, place)
        found[id(model)] = _Respelled(model, rows)
    return Inputs([found[id(model)] for model in inputs.models], found[id(inputs.base)] if inputs.base else None)


class _Respelled:
    """A model whose vocabulary tensors have other rows.

    Args:
        model: The model.
        rows: For each row, the model and the row it is read from; -1 is a row of zeros.
    """

    def __init__(self, model: Source, rows: Sequence[tuple[Source, int]]) -> None:
        self.artifact = model.artifact
        self.label = model.label
        self.content = model.content
        self.config = model.config
        self.headers: dict[str, TensorHeader] = {
            name: replace(header, shape=(len(rows), *header.shape[1:])) if is_vocabulary(name) else header
            for name, header in model.headers.items()
        }
        self._model = model
        self._rows = rows

    def raw(self, name: str, first: int, out: Tensor) -> None:
        self._model.raw(name, first, out)

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        if not is_vocabulary(name):
            self._model.read(name, start, out, scratch)
            return
        # A bias comes as one row of columns, an embedding as rows.
        width = math.prod(self.headers[name].shape[1:])
        flat = out.view(-1, width)
        first = start // width
        place = 0
        while place < len(flat):
            source, row = self._rows[first + place]
            if row < 0:
                flat[place].zero_()
                place += 1
                continue
            count = 1
            while place + count < len(flat) and self._rows[first + place + count] == (source, row + count):
                count += 1
            source.read(name, row * width, flat[place : place + count], scratch)
            place += count
