"""How rows lie side by side in a batch: packed without seeing each other, prompts shared, cut to what fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.api.training import Segments, TokenBatch
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows become batches; what a model computes of them is the same in each way.

    Attributes:
        padding: The id of the padding token; nothing that is trained sees it.
        packed: Whether several documents may share a sequence.
        shared: Whether the two answers of a pair may share their prompt.
        segments: Whether everything lies in one sequence, for a model that computes attention by segments; only where
            documents may share one.
    """

    padding: int
    packed: bool = True
    shared: bool = True
    segments: bool = False

    def cut(self, rows: Sequence[EncodedRow], tokens: int | None = None, most: int | None = None) -> list[list[int]]:
        """Rows in groups for one pass each, as their places: those of similar lengths together.

        Args:
            rows: The rows of an optimizer step.
            tokens: The most tokens of a group, unless one row has more; None: any number.
            most: The most rows of a group; None: any number.
        """
        costs = [self.tokens([row]) for row in rows]
        groups: list[list[int]] = []
        held = 0
        for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
            full = groups and (
                (tokens is not None and held + costs[place] > tokens) or (most is not None and len(groups[-1]) >= most)
            )
            if not groups or full:
                groups.append([])
                held = 0
            groups[-1].append(place)
            held += costs[place]
        return groups

    def tokens(self, rows: Sequence[EncodedRow]) -> int:
        """The tokens of rows as they lie in a batch, without padding."""
        return sum(len(piece) for row in rows for piece in self._pieces(row, 0))

    def batch(self, rows: Sequence[EncodedRow]) -> TokenBatch:
        """One batch of rows.

        Args:
            rows: Rows, all of which are pairs or none is.
        """
        pieces: list[_Piece] = []
        firsts: list[int] = []
        completions = 0
        for row in rows:
            firsts.append(completions)
            pieces += self._pieces(row, completions)
            completions += len(row.completions)
        lengths = [len(piece) for piece in pieces]
        segments = self.packed and self.segments
        if self.packed:
            # Without a mask whose size is the square of it, a sequence may have any length.
            bins = _bins(lengths, sum(lengths) if segments else max(lengths))
        else:
            bins = [[place] for place in range(len(pieces))]
        some = [[pieces[place] for place in places] for places in bins]
        return _filled(some, self.padding, rows, firsts, completions, segments=segments)

    def _pieces(self, row: EncodedRow, first: int) -> Iterator[_Piece]:
        """What of a row stands together in a sequence.

        Args:
            row: The row.
            first: The number of its first completion in the batch.
        """
        if row.paired and self.shared and (prompt := _shared(*row.completions)):
            yield _fork(row, prompt, first)
            return
        for number, item in enumerate(row.completions):
            known = None if row.reference_logps is None else row.reference_logps[number]
            if not item.lengths or self.packed:
                yield _plain(item, first + number, known)
                continue
            assert known is None, "packed documents have no reference"
            for document in unpacked(item):
                yield _plain(document, first + number, None)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens that stay together: a completion, packed documents, or a prompt with the answers to it.

    Attributes:
        ids: The tokens, shape (tokens,).
        positions: Their places in their documents, ...
        documents: ... which document each is of, from 0, ...
        branches: ... and which answer, 0 for a prompt: all of the same shape.
        sources: Where each target is predicted, shape (targets,).
        targets: The ids of the targets, ...
        owner: ... and whose they are, of the same shape.
        reference: log p of the targets under the reference, of the same shape; None where there is none.
    """

    ids: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    branches: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    owner: np.ndarray
    reference: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)


def _plain(item: Encoded, owner: int, reference: Sequence[float] | None) -> _Piece:
    ids, labels = np.asarray(item.input_ids, np.int64), np.asarray(item.labels, np.int64)
    sources = np.flatnonzero(labels[1:] != IGNORED)
    lengths = item.lengths or (len(ids),)
    return _Piece(
        ids,
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat(np.arange(len(lengths)), lengths),
        np.zeros(len(ids), np.int64),
        sources,
        labels[sources + 1],
        np.full(len(sources), owner),
        None if reference is None else np.asarray(reference, np.float32),
    )


def _shared(chosen: Encoded, rejected: Encoded) -> int:
    """How many tokens of their prompt two answers share; 0 where sharing them is not possible."""
    ends = [
        next((place for place, label in enumerate(item.labels) if label != IGNORED), 0) for item in (chosen, rejected)
    ]
    most = min(ends)
    same = np.asarray(chosen.input_ids[:most]) == np.asarray(rejected.input_ids[:most])
    return most if bool(same.all()) else int(np.argmin(same))


def _fork(row: EncodedRow, prompt: int, first: int) -> _Piece:
    """A prompt, and two answers behind it that do not see each other."""
    chosen, rejected = (_plain(item, first + side, None) for side, item in enumerate(row.completions))
    rest = len(chosen) - prompt
    # What stands behind the prompt moves behind the other answer; its first token is predicted from the prompt's last.
    moved = np.where(rejected.sources >= prompt, rejected.sources + rest, rejected.sources)
    reference = None if row.reference_logps is None else np.concatenate([np.asarray(x) for x in row.reference_logps])
    return _Piece(
        np.concatenate([chosen.ids, rejected.ids[prompt:]]),
        np.concatenate([chosen.positions, rejected.positions[prompt:]]),
        np.zeros(len(chosen) + len(rejected) - prompt, np.int64),
        np.repeat([0, 1, 2], [prompt, rest, len(rejected) - prompt]),
        np.concatenate([chosen.sources, moved]),
        np.concatenate([chosen.targets, rejected.targets]),
        np.concatenate([chosen.owner, rejected.owner]),
        None if reference is None else reference.astype(np.float32),
    )


def unpacked(item: Encoded) -> list[Encoded]:
    """The documents of a packed row, each alone."""
    found: list[Encoded] = []
    start = 0
    for length in item.lengths or (len(item.input_ids),):
        found.append(Encoded(item.input_ids[start : start + length], item.labels[start : start + length]))
        start += length
    return found


def _bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of pieces, in bins that take so many tokens: best fit, longest first."""
    bins: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [number for number, room in enumerate(left) if room >= lengths[place]]
        if fitting:
            best = min(fitting, key=lambda number: left[number])
        else:
            best = len(bins)
            bins.append([])
            left.append(capacity)
        bins[best].append(place)
        left[best] -= lengths[place]
    return bins


def _filled(
    bins: Sequence[Sequence[_Piece]],
    padding: int,
    rows: Sequence[EncodedRow],
    firsts: Sequence[int],
    completions: int,
    *,
    segments: bool,
) -> TokenBatch:
    width = max(sum(map(len, pieces)) for pieces in bins)
    shape = (len(bins), width)
    ids = np.full(shape, padding, np.int64)
    mask, branches = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    documents = np.full(shape, -1, np.int64)
    positions = np.zeros(shape, np.int64)
    sources: list[np.ndarray] = []
    for number, pieces in enumerate(bins):
        start = document = 0
        for piece in pieces:
            place = slice(start, start + len(piece))
            ids[number, place], positions[number, place] = piece.ids, piece.positions
            documents[number, place], branches[number, place] = piece.documents + document, piece.branches
            mask[number, place] = 1
            sources.append(piece.sources + number * width + start)
            start += len(piece)
            document += int(piece.documents[-1]) + 1
        # Padding is a document of its own.
        positions[number, start:] = np.arange(width - start)
    pieces = [piece for some in bins for piece in some]
    forked = bool(branches.any())
    several = forked or any(len(some) > 1 or some[0].documents[-1] for some in bins)
    known = [piece.reference for piece in pieces if piece.reference is not None]
    paired, labelled = rows[0].paired, rows[0].desirable is not None
    weights = [row.weight for row in rows for _ in row.completions]
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.concatenate([piece.targets for piece in pieces])),
        torch.from_numpy(np.concatenate([piece.owner for piece in pieces])),
        completions,
        torch.from_numpy(positions) if several else None,
        torch.from_numpy(documents) if forked else None,
        torch.from_numpy(branches) if forked else None,
        _segments(documents[0], branches[0]) if segments and several else None,
        torch.tensor([[first, first + 1] for first in firsts]) if paired else None,
        torch.tensor([bool(row.desirable) for row in rows]) if labelled else None,
        torch.tensor(weights) if any(weight != 1 for weight in weights) else None,
        torch.from_numpy(np.concatenate(known)) if known else None,
    )


def _segments(documents: np.ndarray, branches: np.ndarray) -> Segments:
    """What the tokens of a sequence without padding see.

    Args:
        documents: Which document each is of, shape (tokens,).
        branches: Which answer in it, 0 for a prompt.
    """
    count = len(documents)
    # The first answer follows its prompt as if there were no other.
    begins = (np.diff(documents, prepend=-1) != 0) | (branches > 1) & (np.diff(branches, prepend=0) != 0)
    starts = np.flatnonzero(begins)
    queries = np.diff(np.append(starts, count))
    prompts = [
        np.flatnonzero((documents == documents[start]) & (branches == 0)) if branches[start] > 1 else np.zeros(0, int)
        for start in starts
    ]
    seen = [
        place
        for prompt, start, length in zip(prompts, starts, queries, strict=True)
        for place in (prompt, np.arange(start, start + length))
    ]
    keys = [len(prompt) + int(length) for prompt, length in zip(prompts, queries, strict=True)]

    def ends(lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)

    places = torch.from_numpy(np.concatenate(seen)) if sum(keys) > count else None
    return Segments(queries.tolist(), keys, ends(queries.tolist()), ends(keys), places)
