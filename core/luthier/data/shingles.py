"""Texts as sets of hashed shingles: runs of words, by which texts that are nearly the same are found.

Words are runs of letters and digits, or single signs; each letter of a script that writes words without spaces is one.
All of it is array arithmetic over the bytes of many texts at once: a loop over words in Python takes several times as
long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

WORDS = 5
"""Words of a shingle."""
SPACE, WORD, SIGN = range(3)
BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that hashes a word; odd, so that it has an inverse modulo 2**64."""
CHUNK = 1 << 22
"""Bytes that are hashed at a time."""


@dataclass(frozen=True, slots=True)
class Shingles:
    """The shingles of several texts.

    Attributes:
        hashes: All of them, uint64; those of one text may repeat.
        starts: Where those of each text begin, and the end of all: int64, shape (texts + 1,).
    """

    hashes: np.ndarray
    starts: np.ndarray


def shingles_of(texts: Sequence[str], words: int = WORDS) -> Shingles:
    """The shingles of texts. One of fewer words than a shingle has is one shingle, one without words has none.

    Args:
        texts: The texts; upper case and white space do not count.
        words: How many words a shingle has.
    """
    parts = [_of_chunk(chunk, words) for chunk in _chunks(texts)]
    counts = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in parts)])
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in parts)])
    return Shingles(hashes, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _chunks(texts: Sequence[str]) -> list[list[bytes]]:
    """Encoded texts, in lists of some megabytes."""
    found: list[list[bytes]] = []
    size = 0
    for text in texts:
        encoded = text.casefold().replace("\0", " ").encode("utf-8", "surrogatepass")
        if not found or size + len(encoded) > CHUNK:
            found.append([])
            size = 0
        found[-1].append(encoded)
        size += len(encoded) + 1
    return found


def _of_chunk(texts: list[bytes], words: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all shingles, and how many each text has."""
    hashes, owners = _words_of(texts)
    counts = np.bincount(owners, minlength=len(texts))
    with np.errstate(over="ignore"):
        weights = _powers(words + 1)[1:]
        whole = np.flatnonzero(owners[words - 1 :] == owners[: len(owners) - words + 1]) if len(owners) >= words else []
        made = np.zeros(len(whole), np.uint64)
        for place, weight in enumerate(weights):
            made += hashes[np.asarray(whole, np.int64) + place] * weight
        # A text of fewer words: the sum of what it has.
        short = np.flatnonzero((counts > 0) & (counts < words))
        first = np.concatenate([[0], np.cumsum(counts)])
        rest = np.zeros(len(short), np.uint64)
        for place, weight in enumerate(weights):
            has = counts[short] > place
            rest[has] += hashes[first[short[has]] + place] * weight
    owner = np.concatenate([owners[np.asarray(whole, np.int64)], short])
    order = np.argsort(owner, kind="stable")
    return _mixed(np.concatenate([made, rest]))[order], np.bincount(owner, minlength=len(texts))


def _words_of(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all words in their order, and the place of the text that each is of."""
    data = np.frombuffer(b"\0".join(texts) + b"\0", np.uint8)
    kinds = _kinds()[data]
    begins = np.empty(len(data), bool)
    begins[0] = True
    begins[1:] = (kinds[1:] != kinds[:-1]) | (kinds[1:] == SIGN)
    # Three bytes from U+3000 to U+DFFF: Chinese, Japanese, Korean.
    wide = np.flatnonzero((data >= 0xE3) & (data <= 0xED))
    begins[wide] = True
    begins[wide[wide + 3 < len(data)] + 3] = True
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(data))
    with np.errstate(over="ignore"):
        sums = np.zeros(len(data) + 1, np.uint64)
        np.cumsum((data.astype(np.uint64) + np.uint64(1)) * _powers(len(data)), out=sums[1:])
        hashes = (sums[ends] - sums[starts]) * _powers(len(data), inverse=True)[starts]
    words = kinds[starts] != SPACE
    owners = np.cumsum(data == 0)[starts[words]]
    return _mixed(hashes[words]), owners


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Hashes whose low bits depend on all, as those of a polynomial do not (the end of MurmurHash3)."""
    with np.errstate(over="ignore"):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


@cache
def _kinds() -> np.ndarray:
    """What each byte of UTF-8 is."""
    return np.array(
        [
            WORD if byte > 127 or chr(byte).isalnum() or byte == 95 else SIGN if byte > 32 else SPACE
            for byte in range(256)
        ],
        np.uint8,
    )


def _powers(count: int, *, inverse: bool = False) -> np.ndarray:
    """The first powers of `BASE`, or of its inverse, modulo 2**64."""
    return _all_powers(max(CHUNK + 1, 1 << (count - 1).bit_length()), inverse)[:count]


@cache
def _all_powers(count: int, inverse: bool) -> np.ndarray:
    base = pow(BASE, -1, 2**64) if inverse else BASE
    found = np.ones(count, np.uint64)
    have = 1
    with np.errstate(over="ignore"):
        while have < count:
            more = min(have, count - have)
            found[have : have + more] = found[:more] * np.uint64(pow(base, have, 2**64))
            have += more
    return found
