"""Texts that are nearly the same are found, and nothing else is."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.data import shingles
from luthier.data.shingles import shingles_of
from luthier.data.similar import RECALL, Similar, bands_of, jaccard

SPACES = st.sampled_from([" ", "  ", "\n", "\t "])
SIGN = st.sampled_from([*"abc,.äß9_日本語한🙂", " ", "\n"])
TEXT = st.lists(SIGN, max_size=30).map("".join)


def plainly(text: str, words: int) -> set[tuple[str, ...]]:
    """The shingles of a text, by a regular expression."""
    found = re.findall(r"[\u3000-\ud7ff]|(?:(?![\u3000-\ud7ff])(?:\w|[^\x00-\x7f]))+|[^\w\s]", text.casefold())
    if len(found) < words:
        return {tuple(found)} if found else set()
    return {tuple(found[place : place + words]) for place in range(len(found) - words + 1)}


@given(st.lists(TEXT, max_size=6), st.integers(1, 6))
@settings(max_examples=300)
def test_shingles_are_runs_of_words(texts: list[str], words: int) -> None:
    found = shingles_of(texts, words)
    assert len(found.starts) == len(texts) + 1
    sets = [set(found.hashes[start:end].tolist()) for start, end in itertools.pairwise(found.starts)]
    expected = [plainly(text, words) for text in texts]
    assert [len(one) for one in sets] == [len(one) for one in expected]
    for one, other in itertools.combinations(range(len(texts)), 2):
        assert len(sets[one] & sets[other]) == len(expected[one] & expected[other])


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {n} of some words, and more" * (n % 3) for n in range(40)]
    whole = shingles_of(texts)
    monkeypatch.setattr(shingles, "CHUNK", 100)
    parts = shingles_of(texts)
    assert (whole.starts == parts.starts).all()
    assert (whole.hashes == parts.hashes).all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_of(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= RECALL


def changed(words: list[str], places: int, draw: random.Random) -> str:
    copy = list(words)
    for place in draw.sample(range(len(words)), places):
        copy[place] = f"other{draw.randrange(9999)}"
    return " ".join(copy)


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_pairs_are_found_by_their_real_similarity(tmp_path: Path, threshold: float) -> None:
    draw = random.Random(3)
    texts: list[str] = []
    for _ in range(300):
        words = [f"w{draw.randrange(5000)}" for _ in range(100)]
        texts += [" ".join(words), changed(words, draw.randrange(9), draw)]
    sets = [np.unique(shingles_of([text]).hashes) for text in texts]
    near = {place for place in range(0, 600, 2) if jaccard(sets[place], sets[place + 1]) >= threshold}
    with Similar(tmp_path / "shingles", threshold) as similar:
        for start in range(0, 600, 70):
            similar.add(texts[start : start + 70])
        tied = similar.tied()
    found = {int(first) for place, first in enumerate(tied) if first != place}
    assert found <= near
    assert len(found) >= 0.97 * len(near) > 50
    assert all(tied[place + 1] == place for place in found)
    assert all(likeness == jaccard(sets[one], sets[other]) for one, other, likeness in similar.pairs)
    assert not (tmp_path / "shingles").exists()


def test_texts_are_tied_through_others_to_the_first(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(100)]
    chain = [" ".join(words[:50] + words[50 + n : 100] + [f"x{k}" for k in range(n)]) for n in range(0, 40, 4)]
    with Similar(tmp_path / "shingles", 0.8) as similar:
        similar.add(["nothing alike at all in here", *chain, "", "", "..."])
        assert similar.tied().tolist() == [0, *[1] * len(chain), 11, 12, 13]


def test_white_space_and_case_do_not_count(tmp_path: Path) -> None:
    with Similar(tmp_path / "shingles", 1.0) as similar:
        similar.add(["One  two\nthree", "one two THREE", "one two"])
        assert similar.tied().tolist() == [0, 0, 2]
