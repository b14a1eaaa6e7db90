"""The stage ``mix``: shares, caps, repeats, and a ledger that adds up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Artifact, DataError
from luthier.artifacts.datasets import read_split
from luthier.testing import run_stage, tiny_dataset
from luthier_plugins.mix.config import MixConfig
from luthier_plugins.mix.taking import order_of, times_of


def texts(name: str, count: int, words: int = 3) -> list[dict[str, Any]]:
    return [{"text": " ".join([name, *[f"w{n}"] * words]), "from": name} for n in range(count)]


def mix(folder: Path, *datasets: Artifact, seed: int = 0, **config: Any) -> Artifact:
    return run_stage(folder, "mix", config, inputs={"data": list(datasets)}, seed=seed)


def counts(made: Artifact) -> Counter[str]:
    return Counter(row["from"] for row in read_split(made, "train"))


def test_all_rows_of_all_are_taken_by_default(tmp_path: Path) -> None:
    one = tiny_dataset(tmp_path, texts("one", 5), validation=texts("held", 2))
    other = tiny_dataset(tmp_path, texts("other", 3))
    made = mix(tmp_path, one, other)
    assert counts(made) == {"one": 5, "other": 3}
    assert [row["from"] for row in read_split(made, "validation")] == ["held", "held"]
    assert made.facts["rows"] == {"train": 8, "validation": 2}
    assert made.facts["ledger"] == [["rows of 'data-0'", 7], ["rows of 'data-1'", 3]]


def test_shares_of_rows_take_as_many_as_there_are(tmp_path: Path) -> None:
    one, other = tiny_dataset(tmp_path, texts("one", 60)), tiny_dataset(tmp_path, texts("other", 60))
    made = mix(tmp_path, one, other, shares=[3, 1])
    assert counts(made) == {"one": 60, "other": 20}
    assert sum(count for _, count in made.facts["ledger"]) == 80
    assert ["are more than the share of 'data-1'", -40] in made.facts["ledger"]
    small = mix(tmp_path, one, other, shares=[3, 1], size=40)
    assert counts(small) == {"one": 30, "other": 10}
    assert len({row["text"] for row in read_split(small, "train")}) == 40


def test_shares_of_tokens_weigh_long_rows(tmp_path: Path) -> None:
    short, long = tiny_dataset(tmp_path, texts("short", 400, 5)), tiny_dataset(tmp_path, texts("long", 400, 50))
    made = mix(tmp_path, short, long, shares=[1, 1], by="tokens")
    shares = [about["share_of_tokens"] for about in made.facts["mixed"]]
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    assert counts(made)["short"] == 400
    assert counts(made)["long"] < 60


def test_rows_are_taken_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    one, other = tiny_dataset(tmp_path, texts("one", 10)), tiny_dataset(tmp_path, texts("other", 90))
    with pytest.raises(DataError, match="there are 20 rows, not 60"):
        mix(tmp_path, one, other, shares=[1, 1], size=60)
    made = mix(tmp_path, one, other, shares=[1, 1], size=60, repeats=[3, 1])
    assert counts(made) == {"one": 30, "other": 30}
    often = Counter(row["text"] for row in read_split(made, "train"))
    assert {often[row["text"]] for row in texts("one", 10)} == {3}
    assert max(often[row["text"]] for row in texts("other", 90)) == 1
    assert ["are taken once more", 20] in made.facts["ledger"]
    assert sum(count for _, count in made.facts["ledger"]) == 60


def test_caps_and_seeds(tmp_path: Path) -> None:
    one, other = tiny_dataset(tmp_path, texts("one", 50)), tiny_dataset(tmp_path, texts("other", 50))
    first, same, another = (mix(tmp_path, one, other, caps=[20, None], seed=seed) for seed in (1, 1, 2))
    assert counts(first) == {"one": 20, "other": 50}
    assert first.key == same.key
    taken = [{row["text"] for row in read_split(made, "train")} for made in (first, another)]
    assert taken[0] != taken[1]


def test_datasets_of_two_schemas_are_refused() -> None:
    config = MixConfig(data=["a", "b"])
    assert config.early_problems({"data": [{"schema": "text"}, {"schema": "messages"}]})
    assert not config.early_problems({"data": [{"schema": "text"}, {}]})


@pytest.mark.parametrize("wrong", [{"shares": [1]}, {"caps": [1]}, {"repeats": [1, 2, 3]}, {"size": 3}])
def test_one_number_for_each_dataset(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"entries for 2 datasets|needs `shares`"):
        MixConfig(data=["a", "b"], **wrong)


@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=2, max_size=3),
    shares=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    by=st.sampled_from(["rows", "tokens"]),
    repeats=st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_no_row_is_taken_more_often_than_it_may_and_shares_are_met(
    sizes: list[list[int]], shares: list[float], by: Any, repeats: list[int]
) -> None:
    count = len(sizes)
    config = MixConfig(data=["d"] * count, shares=shares[:count], by=by, repeats=repeats[:count])
    tokens = [np.asarray(some) for some in sizes]
    times = times_of(config, [order_of([str(n) for n in range(len(some))], 0) for some in sizes], tokens)
    took = [int((some if by == "rows" else some * size).sum()) for some, size in zip(times, tokens, strict=True)]
    largest = max(max(some) for some in sizes) if by == "tokens" else 1
    for some, often in zip(times, repeats[:count], strict=True):
        assert some.max() <= often
        assert some.max() - some.min() <= 1
    scale = min(
        (len(some) if by == "rows" else sum(some)) * often / share
        for some, often, share in zip(sizes, repeats, shares, strict=False)
    )
    for got, share in zip(took, shares, strict=False):
        assert abs(got - share * scale) <= largest / 2 + 1


@given(more=st.integers(1, 60), seed=st.integers(0, 3))
def test_added_rows_leave_the_order_of_the_others(more: int, seed: int) -> None:
    ids = [f"r{n}" for n in range(40 + more)]
    few, all_ = order_of(ids[:40], seed), order_of(ids, seed)
    assert [place for place in all_ if place < 40] == few.tolist()
