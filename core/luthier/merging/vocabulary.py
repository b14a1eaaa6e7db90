"""Models with different tokenizers: one vocabulary, and every model's rows moved to its places."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.api import ModelError
from luthier.artifacts.json_files import write_json
from luthier.artifacts.models import carry_text_files
from luthier.artifacts.tensors import EMBEDDINGS, TensorHeader
from luthier.artifacts.texts import read_vocabulary
from luthier.merging.check import is_vocabulary
from luthier.merging.config import TokenRows
from luthier.merging.files import Scratch, fill_on_cpu
from luthier.merging.layout import Inputs
from luthier.merging.reader import Source

TOKENIZER = "tokenizer.json"
SOURCES = "token_sources.json"
"""Which model each token comes from that the first one does not have."""
SAME = ("normalizer", "pre_tokenizer", "decoder")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MEAN_BLOCK = 1 << 19
"""Entries read at once to take a mean of rows."""
Tokenizer = dict[str, Any]


Origin = tuple[tuple[Source, int], ...]
"""What a row is the mean of: rows of models; of nothing: of the rows of all tokens."""
NEW = "new"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a token's rows come from by the config.

    Attributes:
        origin: The rows; None is zeros.
        force: Whether they replace rows that a model has.
    """

    origin: Origin | None
    force: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The merged model's tokens.

    Attributes:
        owner: The model whose tokenizer it is, or is built on; its text files and special ids are taken.
        tokenizer: The content of ``tokenizer.json``.
        rows: Rows of the embedding.
        sources: For each token that the owner does not have, the models its rows come from.
        chosen: Tokens whose rows the config chose.
    """

    owner: Source
    tokenizer: Tokenizer
    rows: int
    sources: dict[str, str]
    chosen: dict[str, Chosen]

    def write(self, out: Path) -> None:
        """Write the tokenizer and what else belongs to the text."""
        carry_text_files(self.owner.artifact.path, out)
        if self.sources:
            write_json(out / TOKENIZER, self.tokenizer)
            write_json(out / SOURCES, self.sources)

    def settle(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with this vocabulary's size and special ids."""
        ids = {key: self.owner.config[key] for key in IDS if key in self.owner.config}
        return {**config, **ids, "vocab_size": self.rows}


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of every token, added ones included."""
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    return vocabulary | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}


def vocabulary_of(
    inputs: Inputs,
    owner: Source,
    *,
    joined: bool = False,
    tokens: Sequence[tuple[TokenRows, Source | None]] = (),
    multiple: int = 1,
) -> Vocabulary:
    """The vocabulary of one model, with what else there is to be in it.

    Args:
        inputs: The models.
        owner: The model.
        joined: Whether every token of every other model is in it too.
        tokens: Tokens that are in it in any case, each with the model that its rows come from.
        multiple: What the number of rows is a multiple of.

    Raises:
        ModelError: a tokenizer has no ``tokenizer.json``, they are of different kinds, or a token's rows come from
            where there are none.
    """
    tokenizer = _read(owner)
    sources: dict[str, str] = {}
    if joined:
        for other in inputs.all:
            if other is not owner:
                tokenizer = _joined(tokenizer, _read(other), owner, other, sources)
    missing = [rows.token for rows, _ in tokens if rows.token not in tokens_of(tokenizer)]
    if missing:
        tokenizer = _with_tokens(tokenizer, missing)
    donors = _donors(inputs, own_rows(inputs), [*sources, *missing])
    sources = {token: " and ".join(model.label for model, _ in origin) or NEW for token, origin in donors.items()}
    chosen = {
        rows.token: Chosen(None if rows.zero else _row_of(rows, model), rows.force)
        for rows, model in tokens
        if rows.zero or model is not None
    }
    sources |= {rows.token: model.label for rows, model in tokens if model is not None and rows.token in sources}
    count = max(_rows(owner), max(tokens_of(tokenizer).values()) + 1)
    return Vocabulary(owner, tokenizer, -(-count // multiple) * multiple, sources, chosen)


def own_tokens(model: Source) -> dict[str, int]:
    """The id of every token of a model's tokenizer."""
    return tokens_of(_read(model))


def own_rows(inputs: Inputs) -> dict[str, dict[str, int]]:
    """For each model, by its key, the row of every token that it has one for."""
    return {
        model.artifact.key: {token: row for token, row in tokens_of(_read(model)).items() if row < _rows(model)}
        for model in inputs.all
    }


def _donors(inputs: Inputs, own: Mapping[str, Mapping[str, int]], tokens: Iterable[str]) -> dict[str, Origin]:
    """Where a model that lacks a token gets its rows from: the base, else all that have it."""
    found: dict[str, Origin] = {}
    for token in tokens:
        having = [model for model in inputs.all if token in own[model.artifact.key]]
        if inputs.base is not None and inputs.base in having:
            having = [inputs.base]
        found[token] = tuple((model, own[model.artifact.key][token]) for model in having if model is not None)
    return found


def _row_of(rows: TokenRows, model: Source | None) -> Origin:
    """The row of a model that the config chose for a token."""
    assert model is not None, "without a model, nothing was chosen"
    known = tokens_of(_read(model))
    wanted = rows.token if rows.like is None else rows.like
    row = wanted if isinstance(wanted, int) else known.get(wanted)
    if row is None or not 0 <= row < _rows(model):
        raise ModelError(f"the rows of {rows.token!r} should come from {model.label}, which has none for {wanted!r}")
    return ((model, row),)


def _with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer with more tokens after its own, taken as they are written."""
    more = copy.deepcopy(tokenizer)
    following = max(tokens_of(tokenizer).values()) + 1
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    more["added_tokens"] = [
        *(more.get("added_tokens") or []),
        *({"id": following + place, "content": token, **plain} for place, token in enumerate(dict.fromkeys(tokens))),
    ]
    return more


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
        raise ModelError(
            f"{model.label} has no {TOKENIZER}",
            where=str(model.artifact.path),
            hint="load its tokenizer with transformers and save it again",
        )
    tokenizer, _ = read_vocabulary(path)
    if not isinstance(tokenizer["model"].get("vocab"), dict):
        raise ModelError(
            f"the tokenizer of {model.label} is a {tokenizer['model'].get('type')} model, which cannot be joined",
            where=str(path),
            hint="merge models that share it",
        )
    return tokenizer


def _joined(first: Tokenizer, second: Tokenizer, lead: Source, other: Source, sources: dict[str, str]) -> Tokenizer:
    """The first tokenizer with what only the second has: tokens after its own, merges after its own."""
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
    own = own_rows(inputs)
    lacking = [token for token in tokens if not all(token in rows for rows in own.values())]
    donors = _donors(inputs, own, lacking)
    found: dict[int, Source] = {}
    for model in inputs.all:
        known = own[model.artifact.key]
        rows: list[Origin | None] = [()] * vocabulary.rows
        for token, place in tokens.items():
            chosen = vocabulary.chosen.get(token)
            if chosen is not None and (chosen.force or token not in known):
                rows[place] = chosen.origin
            else:
                rows[place] = ((model, known[token]),) if token in known else donors[token]
        # Rows of no token are padding. A model's own stand where it has such; else those of the model whose vocabulary
        # it is, so that nothing differs there; else the mean.
        taken, of_tokens = set(known.values()), set(tokens.values())
        for place in set(range(vocabulary.rows)) - of_tokens:
            if place < _rows(model) and place not in taken:
                rows[place] = ((model, place),)
            elif place < _rows(vocabulary.owner):
                rows[place] = ((vocabulary.owner, place),)
        found[id(model)] = _Respelled(model, rows, of_tokens)
    return Inputs(
        [found[id(model)] for model in inputs.models],
        found[id(inputs.base)] if inputs.base else None,
        {place: found[id(model)] for place, model in inputs.own_bases.items()},
    )


class _Respelled:
    """A model whose vocabulary tensors have other rows.

    Args:
        model: The model.
        rows: For each row, what it is the mean of; None is zeros.
        of_tokens: The rows that are of tokens.
    """

    def __init__(self, model: Source, rows: Sequence[Origin | None], of_tokens: Set[int]) -> None:
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
        self._of_tokens = of_tokens
        self._means: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def raw(self, name: str, first: int, out: Tensor) -> None:
        self._model.raw(name, first, out)

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        if not is_vocabulary(name):
            self._model.read(name, start, out, scratch)
            return
        fill_on_cpu(out, lambda here, before: self._spelled(name, start + before, here, scratch))

    def _spelled(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        # A bias comes as one row of columns, an embedding as rows.
        width = math.prod(self.headers[name].shape[1:])
        flat = out.view(-1, width)
        unknown = self._fill(name, start // width, flat, scratch)
        if unknown:
            flat[unknown] = self._mean(name, width)

    def _fill(self, name: str, first: int, flat: Tensor, scratch: Scratch) -> list[int]:
        """Read rows; the places of those that are the mean of all tokens' rows are returned and left as they are."""
        unknown: list[int] = []
        place = 0
        while place < len(flat):
            origin = self._rows[first + place]
            count = 1
            if origin is None:
                flat[place].zero_()
            elif len(origin) == 1:
                source, row = origin[0]
                # Consecutive rows are read at once.
                while place + count < len(flat) and self._rows[first + place + count] == ((source, row + count),):
                    count += 1
                source.read(name, row * flat.shape[1], flat[place : place + count], scratch)
            elif origin:
                flat[place] = torch.stack([self._row(name, *one, flat.shape[1], scratch) for one in origin]).mean(dim=0)
            else:
                unknown.append(place)
            place += count
        return unknown

    @staticmethod
    def _row(name: str, source: Source, row: int, width: int, scratch: Scratch) -> Tensor:
        out = torch.empty(1, width)
        source.read(name, row * width, out, scratch)
        return out[0]

    def _mean(self, name: str, width: int) -> Tensor:
        """The mean of the tokens' rows, without those that are the mean themselves."""
        with self._lock:
            if name not in self._means:
                scratch = Scratch()
                total, seen = torch.zeros(width, dtype=torch.float64), 0
                step = max(1, MEAN_BLOCK // width)
                for first in range(0, len(self._rows), step):
                    block = torch.empty(min(step, len(self._rows) - first), width)
                    left_out = set(self._fill(name, first, block, scratch))
                    kept = [
                        place
                        for place in range(len(block))
                        if first + place in self._of_tokens and place not in left_out
                    ]
                    total += block[kept].double().sum(dim=0)
                    seen += len(kept)
                self._means[name] = (total / max(1, seen)).float()
            return self._means[name]
