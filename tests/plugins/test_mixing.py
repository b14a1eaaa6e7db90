"""Datasets in given shares: which rows an epoch takes of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chats import CHATS
from hypothesis import given
from hypothesis import strategies as st
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.training import run
from luthier.training.mixing import Mix

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(sizes, st.data(), st.integers(0, 2**31))
def test_an_epoch_has_the_shares_and_every_row_its_turn(rows: list[int], data: st.DataObject, seed: int) -> None:
    weights = [1.0, *(data.draw(st.floats(0, 3)) for _ in rows[1:])]
    mix = Mix.of(rows, weights)
    assert mix.taken[0] == rows[0]
    starts = [sum(rows[:number]) for number in range(len(rows) + 1)]
    seen: Counter[int] = Counter()
    for epoch in range(5):
        order = mix.order(seed, epoch).tolist()
        assert order == mix.order(seed, epoch).tolist()
        assert len(order) == len(mix)
        for number, taken in enumerate(mix.taken):
            mine = [place for place in order if starts[number] <= place < starts[number + 1]]
            assert len(mine) == taken == (rows[0] if not number else round(rows[0] * weights[number]))
        seen.update(order)
    # No row comes a second time before the others of its dataset came once.
    for number in range(len(rows)):
        counts = [seen[place] for place in range(starts[number], starts[number + 1])]
        assert max(counts) - min(counts) <= 1


@given(sizes, st.integers(0, 2**31))
def test_without_weights_all_rows_come_once_in_an_order_that_changes(rows: list[int], seed: int) -> None:
    mix = Mix.of(rows, None)
    orders = [mix.order(seed, epoch).tolist() for epoch in range(2)]
    assert all(sorted(order) == list(range(sum(rows))) for order in orders)
    if sum(rows) > 12:
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("stage", ["sft", "pretrain", "dpo"])
def test_a_stage_takes_the_rows_that_its_weights_ask_for(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    inner = run.Passes.step

    def step(self: Any, rows: Any, backward: Any) -> Any:
        seen.extend(rows)
        return inner(self, rows, backward)

    monkeypatch.setattr(run.Passes, "step", step)

    def rows(word: str, count: int) -> list[dict[str, Any]]:
        if stage != "dpo":
            return [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": word * 40}]}
                    for n in range(count)]  # fmt: skip
        return [{"prompt": [{"role": "user", "content": f"{n}"}],
                 "chosen": [{"role": "assistant", "content": word * 40}],
                 "rejected": [{"role": "assistant", "content": "no"}]} for n in range(count)]  # fmt: skip

    data = [tiny_dataset(tmp_path, rows(word, count)) for word, count in (("a", 12), ("b", 30))]
    config = {"epochs": 2, "batch_size": 4, "weights": [0.75, 0.25], "max_length": 64 if stage == "pretrain" else 512}
    made = run_stage(tmp_path, stage, config, inputs={"model": tiny_model(tmp_path), "data": data})
    facts = made.facts["training"]
    first, second = facts["rows_in_epoch"]
    assert second == round(first / 3)
    assert facts["steps"] == 2 * -(-(first + second) // 4)
    texts = [tuple(row.completions[0].input_ids) for row in seen]
    assert len(texts) == 2 * (first + second)
    counts = Counter(texts)
    # Rows of the first come once an epoch; those of the second that came in one are not those of the other.
    twice = [text for text, count in counts.items() if count == 2]
    assert len(twice) == first
    assert len(counts) == first + 2 * second


@pytest.mark.parametrize("weights", [[1.0], [0.0, 1.0], [1.0, -1.0], []])
def test_weights_that_fit_no_datasets_are_refused_while_planning(weights: list[float]) -> None:
    with pytest.raises(Exception, match="weights"):
        default_registry().use("stage", {"uses": "sft", "model": "m", "data": ["d", "e"], "weights": weights})


def test_a_dataset_that_nothing_is_taken_of_is_named(tmp_path: Path) -> None:
    data = [tiny_dataset(tmp_path, CHATS[:4]), tiny_dataset(tmp_path, CHATS[4:])]
    config = {"steps": 1, "batch_size": 4, "weights": [1.0, 0.05]}
    made = run_stage(tmp_path, "sft", config, inputs={"model": tiny_model(tmp_path), "data": data})
    assert any("leave nothing of a dataset" in text for text in made.manifest["warnings"])
