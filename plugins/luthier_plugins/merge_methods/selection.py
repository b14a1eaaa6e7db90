"""Exact selection by rank over a parameter that is never held in memory as a whole.

A sample shows about where a rank is; one walk then counts what is above and holds the few values around it. Where the
sample was misleading, two histograms find the rank: the bits of a float that is not negative, read as an integer, have
the order of the floats, and one histogram of the upper half of the bits and one of the lower half within the bin that
holds the rank give the exact entry, as the first digits of a radix sort do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from luthier.merging.api import MergePart, Scan
from torch import Tensor

HALF = 16
BINS = 1 << HALF
IN_MEMORY = 1 << 22
"""Entries up to which a parameter's values are held at once, ..."""
ROOM = 160 << 20
"""... as long as all threads together hold no more bytes than that: the others read the parts more often instead."""
SAMPLED_PARTS = 8
"""Every so many-th part is in the sample, or fewer of a very large parameter, ..."""
SAMPLED_VALUES = 8
"""... and of it every so many-th value."""
SAMPLE = 1 << 19
"""About how many values of each kind the sample has at most."""
MARGIN = 0.02
"""How far a rank may be from where the sample has it, as a share of all entries, ..."""
HELD = 1 << 24
"""... unless more than half of so many values would be held: more of them never are, however large the parameter."""
EVERYTHING = 1 << 62
"""A place after every part."""
Values = Callable[[MergePart], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Cut:
    """The `count` largest values of a parameter; among equal values, those with the lowest index.

    Attributes:
        value: Larger values belong to it.
        start: Of the values equal to it, those in parts that begin before `start` belong to it, ...
        more: ... and the first `more` of the part that begins there.
    """

    value: float
    start: int
    more: int

    @property
    def below(self) -> float:
        """The float32 below `value`: what is larger than it, is at least `value`."""
        return float(np.nextafter(np.float32(self.value), np.float32(-math.inf)))

    def whole(self, start: int) -> bool:
        """Whether all values equal to `value` in the part that begins at `start` belong to it, unless it is zero."""
        return start < self.start and self.value > 0

    def holds(self, values: Tensor, start: int) -> Tensor:
        """Which of a part's values belong to it: 1 and 0, float32, in place of the values."""
        # In place, on floats: comparisons that make booleans, and products with them, are several times slower.
        if start < self.start:
            return values.ge_(self.value)
        if start > self.start or not self.more:
            return values.gt_(self.value)
        equal = (values == self.value).flatten().nonzero().flatten()[: self.more]
        chosen = values.gt_(self.value)
        chosen.view(-1)[equal] = 1.0
        return chosen


NOTHING = Cut(math.inf, 0, 0)
"""The largest none of a parameter's values."""


class Room:
    """What the threads of a process may hold together.

    Args:
        size: In bytes.
    """

    def __init__(self, size: int) -> None:
        self.left = size
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, size: int) -> Iterator[bool]:
        """Whether there is room for so many bytes; it is taken inside the context."""
        with self._lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        try:
            yield fits
        finally:
            with self._lock:
                self.left += size if fits else 0


_room = Room(ROOM)


def largest(scan: Scan, values: Values, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For each kind of value, the cuts that hold its so many largest.

    Args:
        scan: The parameter.
        values: What to compare, one tensor or more for each part: float32, none negative, no -0.0.
        counts: For each of these tensors, how many of the largest, from 0 to the number of entries.

    Returns:
        A cut for each count.
    """
    entries = math.prod(scan.parameter.shape)
    if scan.on_gpu:
        return _by_sorting(scan, values, counts)
    if entries <= IN_MEMORY:
        # The values of each kind, and a copy of one of them to partition.
        with _room.taken(4 * entries * (len(counts) + 1)) as fits:
            if fits:
                return _in_memory(scan, values, counts)
    wanted = [(kind, count) for kind, several in enumerate(counts) for count in several]
    rows = iter(_bracketed(scan, values, wanted, entries) or _by_histograms(scan, values, wanted))
    return [[next(rows) for _ in several] for several in counts]


def _by_histograms(scan: Scan, values: Values, wanted: Sequence[tuple[int, int]]) -> list[Cut]:
    """The cuts, for any values; reads everything two or three times."""
    upper = scan(lambda part: torch.stack([_histogram(_keys(value) >> HALF, BINS) for value in values(part)]))
    bins: list[int] = []
    left: list[int] = []
    for kind, count in wanted:
        place, over = _locate(upper[kind], count)
        bins.append(place)
        left.append(count - over)
    kinds = [kind for kind, _ in wanted]
    lower = scan(lambda part: _lower(values(part), kinds, bins))
    cutoffs: list[float] = []
    missing: list[int] = []
    total: list[int] = []
    for row, (bin_, rest) in enumerate(zip(bins, left, strict=True)):
        place, over = _locate(lower[row], rest)
        bits = torch.tensor((bin_ << HALF) + place, dtype=torch.int32)
        cutoffs.append(float(bits.view(torch.float32)))
        missing.append(rest - over)
        total.append(int(lower[row, place]))
    return _tied(scan, values, wanted, cutoffs, missing, total)


def _bracketed(scan: Scan, values: Values, wanted: Sequence[tuple[int, int]], entries: int) -> list[Cut] | None:
    """The cuts from one walk over everything, or None where the sample was misleading."""
    every = max(SAMPLED_PARTS, entries // (SAMPLED_VALUES * SAMPLE))
    drawn = scan.each(lambda part: torch.stack([value.flatten()[::SAMPLED_VALUES] for value in values(part)]), every)
    sample = np.sort(torch.cat(drawn, dim=1).numpy(), axis=1)
    size = sample.shape[1]
    margin = min(MARGIN, HELD / (4 * entries * len(wanted)))
    brackets: list[tuple[int, float, float]] = []
    for kind, count in wanted:
        place = size * (1 - count / entries)
        low, high = min(math.floor(place - margin * size), size - 1), math.ceil(place + margin * size)
        brackets.append((kind, sample[kind, low] if low > 0 else 0.0, sample[kind, high] if high < size else math.inf))
    inside: dict[int, list[Any]] = {}
    room = HELD

    def count_over(part: MergePart) -> Tensor:
        nonlocal room
        given = [value.flatten().numpy() for value in values(part)]
        held = [given[kind][(given[kind] >= low) & (given[kind] <= high)] for kind, low, high in brackets]
        room -= sum(map(len, held))
        # Threads may miss each other's subtractions: it bounds memory about, and no result depends on it.
        inside[part.start] = held if room > 0 else []
        return torch.tensor([np.count_nonzero(given[kind] > high) for kind, _, high in brackets])

    over = scan(count_over).tolist()
    if not all(inside.values()):
        return None
    starts = sorted(inside)
    found: list[Cut] = []
    for row, (_, count) in enumerate(wanted):
        several = [inside[start][row] for start in starts]
        flat, rest = np.concatenate(several), count - over[row]
        if count and not 0 < rest <= len(flat):
            return None
        places = np.cumsum([0, *map(len, several[:-1])])
        ordered = np.partition(flat, len(flat) - rest) if count else flat
        found.append(_partitioned(flat, ordered, rest if count else 0, places, np.array(starts)))
    return found


def _in_memory(scan: Scan, values: Values, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """`largest` for a parameter whose values fit into memory."""
    # One by one: an allocation as large as all of them together would get new pages from the system every time.
    held = [torch.empty(math.prod(scan.parameter.shape)) for _ in counts]

    def hold(part: MergePart) -> Tensor:
        for kind, value in enumerate(values(part)):
            held[kind][part.start : part.start + value.numel()].view(value.shape).copy_(value)
        return torch.tensor(part.start)

    starts = torch.stack(scan.each(hold)).numpy()
    result: list[list[Cut]] = []
    for kind, several in enumerate(counts):
        flat = held[kind].numpy()
        ranks = [len(flat) - count for count in several if count]
        ordered = np.partition(flat, ranks) if ranks else flat
        result.append([_partitioned(flat, ordered, count, starts, starts) for count in several])
    return result


def _by_sorting(scan: Scan, values: Values, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """`largest` on a GPU, where nothing is as fast as sorting."""
    starts = np.array([int(start) for start in scan.each(lambda part: torch.tensor(part.start))])
    result: list[list[Cut]] = []
    for kind, several in enumerate(counts):
        # One kind at a time: that, sorted, with the places that sorting keeps, takes the most memory.
        flat = torch.cat(scan.each(lambda part, kind=kind: values(part)[kind].flatten()))
        ordered = flat.sort(descending=True).values
        cuts: list[Cut] = []
        for count in several:
            if not count:
                cuts.append(NOTHING)
                continue
            value = ordered[count - 1]
            missing = int((ordered[:count] == value).sum())
            equal = (flat == value).nonzero().flatten()
            cuts.append(_cut(float(value), missing, equal, starts, starts))
        result.append(cuts)
    return result


def _partitioned(flat: Any, ordered: Any, count: int, places: Any, starts: Any) -> Cut:
    """The cut at a rank of partitioned values.

    Args:
        flat: The values, part after part.
        ordered: They, partitioned at the rank.
        count: How many of the largest belong to the cut.
        places: Where each part's values begin among them.
        starts: Where each part begins in the parameter.
    """
    if not count:
        return NOTHING
    value = ordered[len(flat) - count]
    missing = int(np.count_nonzero(ordered[len(flat) - count :] == value))
    return _cut(float(value), missing, np.flatnonzero(flat == value), places, starts)


def _cut(value: float, missing: int, equal: Any, places: Any, starts: Any) -> Cut:
    """The cut with all values above `value`, and the first `missing` of those equal to it, which are at `equal`."""
    if missing == len(equal):
        return Cut(value, EVERYTHING, 0)
    last = int(equal[missing - 1])
    part = np.searchsorted(places, last, side="right") - 1
    return Cut(value, int(starts[part]), missing - int((equal < int(places[part])).sum()))


def _keys(values: Tensor) -> Tensor:
    """The bits of floats that are not negative: integers in the same order."""
    return values.flatten().view(torch.int32)


def _histogram(keys: Tensor, bins: int) -> Tensor:
    return torch.bincount(keys, minlength=bins)


def _locate(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the count-th largest, and how many are in the bins above it."""
    above = histogram.flip(0).cumsum(0)
    behind = int(torch.searchsorted(above, max(count, 1)))
    over = int(above[behind - 1]) if behind else 0
    return BINS - 1 - behind, over


def _lower(values: Sequence[Tensor], kinds: Sequence[int], bins: Sequence[int]) -> Tensor:
    """Of the keys in each bin, the histogram of their lower halves."""
    result = torch.zeros(len(kinds), BINS, dtype=torch.int64)
    for row, (kind, bin_) in enumerate(zip(kinds, bins, strict=True)):
        # What is below or above the bin falls into a bin on either side.
        keys = _keys(values[kind]).sub((bin_ << HALF) - 1).clamp_(0, BINS + 1)
        result[row] = _histogram(keys, BINS + 2)[1 : BINS + 1]
    return result


def _tied(
    scan: Scan,
    values: Values,
    wanted: Sequence[tuple[int, int]],
    cutoffs: Sequence[float],
    missing: Sequence[int],
    total: Sequence[int],
) -> list[Cut]:
    """Where to stop among equal values, in the order of the parts."""
    cuts = [Cut(value, EVERYTHING, 0) if count else NOTHING for value, (_, count) in zip(cutoffs, wanted, strict=True)]
    open_rows = [row for row, (_, count) in enumerate(wanted) if count and missing[row] < total[row]]
    if not open_rows:
        return cuts

    def count(part: MergePart) -> Tensor:
        given = values(part)
        return torch.tensor([part.start, *(int((given[wanted[row][0]] == cutoffs[row]).sum()) for row in open_rows)])

    found = torch.stack(scan.each(count)).tolist()
    for column, row in enumerate(open_rows, 1):
        need = missing[row]
        for counts in found:
            if counts[column] >= need:
                cuts[row] = Cut(cutoffs[row], counts[0], need)
                break
            need -= counts[column]
    return cuts
