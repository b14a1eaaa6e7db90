"""Splits keep twins together, facts are numbers, and the recipe's date is part of keys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import Recipe, plan
from luthier.api import DataError, Message, RecipeError, StageError
from luthier.artifacts.datasets import SPLITS, read_split
from luthier.artifacts.rows import taught_by
from luthier.testing import run_stage
from luthier.worker.execute import check_facts
from luthier_plugins.data.config import SplitConfig
from luthier_plugins.data.sides import draws_of, sides_of


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [Message(role="user", content=question), Message(role="assistant", content=answer)], **more}


def pair(prompt: str, chosen: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [Message(role="user", content=prompt)],
        "chosen": [Message(role="assistant", content=chosen)],
        "rejected": [Message(role="assistant", content="no")],
        **more,
    }


def liked(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    answer = [Message(role="assistant", content=completion)]
    return {"prompt": [Message(role="user", content=prompt)], "completion": answer, "label": True, **more}


MAKERS = {
    "messages": lambda key, twin: chat(f"q{key}", f"a{key}", id=str(twin)),
    "preference": lambda key, twin: pair(f"q{key}", f"answer {twin}", id=str(twin)),
    "labelled": lambda key, twin: liked(f"q{key}", f"answer {twin}", source=str(twin)),
    "prompt": lambda key, twin: {"prompt": [Message(role="user", content=f"q{key}")], "id": str(twin)},
    "text": lambda key, twin: {"text": f"Text {key}" + " " * twin, "id": str(twin)},
}


@pytest.mark.parametrize("schema", MAKERS)
@given(seed=st.integers(0, 9), twins=st.integers(1, 5), test=st.floats(0.1, 0.4), validation=st.floats(0.0, 0.4))
def test_twins_are_never_on_two_sides(schema: str, seed: int, twins: int, test: float, validation: float) -> None:
    rows = [(MAKERS[schema](key, twin), None) for twin in range(twins) for key in range(12)]
    sides = sides_of(draws_of(rows, seed), SplitConfig(test=test, validation=validation)).reshape(twins, 12)
    assert (sides == sides[0]).all()
    assert (sides == SPLITS.index("test")).any()
    assert (sides == SPLITS.index("validation")).any() == (validation > 0)


@given(seed=st.integers(0, 5), more=st.integers(1, 400), test=st.floats(0.05, 0.4), validation=st.floats(0.05, 0.4))
def test_a_row_stays_on_its_side_when_others_come(seed: int, more: int, test: float, validation: float) -> None:
    split = SplitConfig(test=test, validation=validation)
    rows = [(chat(f"q{key}", "a"), None) for key in range(200 + more)]
    few, all_ = (sides_of(draws_of(some, seed), split) for some in (rows[:200], rows))
    assert (few == all_[:200]).all()


@pytest.mark.parametrize(("test", "validation"), [(0.1, 0.0), (0.05, 0.3), (0.4, 0.5)])
def test_shares_are_what_was_asked_for(test: float, validation: float) -> None:
    draws = draws_of([(chat(f"q{key}", "a"), None) for key in range(5000)], 3)
    sides = sides_of(draws, SplitConfig(test=test, validation=validation))
    for name, share in (("test", test), ("validation", validation)):
        spread = math.sqrt(share * (1 - share) / 5000)
        assert abs(float((sides == SPLITS.index(name)).mean()) - share) <= 4 * spread


def test_groups_and_prompts_stay_together_whatever_is_answered() -> None:
    split = SplitConfig(test=0.5)
    same = [(chat("What is it?", f"a{key}"), None) for key in range(50)]
    assert len(set(draws_of(same, 0)[:, 0])) == 1
    grouped = [(chat(f"q{key}", "a"), f"author {key % 5}") for key in range(50)]
    sides = sides_of(draws_of(grouped, 0), split).reshape(10, 5)
    assert (sides == sides[0]).all()
    assert len(set(sides[0])) == 2


def test_too_few_prompts_for_the_shares_are_refused() -> None:
    with pytest.raises(DataError, match="1 different prompts are too few"):
        sides_of(draws_of([(chat("q", "a"), None)] * 9, 0), SplitConfig(test=0.2))


def test_white_space_and_case_make_no_other_row() -> None:
    assert taught_by(chat("What  is it?", "A lamp.\n")) == taught_by(chat("what is it?", "a Lamp.", id="7"))
    assert taught_by(chat("What is it?", "A lamp.")) != taught_by(chat("What is it?", "A map."))
    assert taught_by(pair("What is it?", "A lamp.")) == taught_by(pair("What is it?", "A map."))


def test_kept_columns_do_not_split_twins(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    rows = [chat(f"q{n % 8}", f"a{n % 8}", slice=f"r{n}") for n in range(32)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run_stage(tmp_path / "s", "data", {"source": str(source), "split": {"test": 0.25}, "keep": ["slice"]})
    train, test = ({taught_by(row) for row in read_split(made, split)} for split in ("train", "test"))
    assert test
    assert not train & test


def test_augmented_rows_that_are_held_out_in_other_words_are_dropped(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(chat(f"Say {n}", f"{n}!")) + "\n" for n in range(6)))
    data = run_stage(tmp_path / "s", "data", {"source": str(source), "split": {"test": 0.5}})
    template = {"messages": [{"role": "user", "content": "say  {{ n }}"}, {"role": "assistant", "content": "{{ n }}!"}]}
    method = {"uses": "template", "templates": [template], "slots": {"n": [str(n) for n in range(6)]}, "count": 6}
    more = run_stage(tmp_path / "s", "augment", {"method": method}, inputs={"data": data})
    assert more.facts["dropped"]["is held out"] == data.facts["rows"]["test"] > 0
    assert not {taught_by(row) for row in read_split(more, "train")} & {
        taught_by(row) for row in read_split(more, "test")
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_facts_that_are_no_numbers_are_refused_with_their_place(value: float) -> None:
    facts = {"scores": {"good": 1.0, "bad": [0.5, value]}}
    with pytest.raises(StageError, match=r"scores\.bad\[1\] is (nan|inf|-inf)"):
        check_facts(facts, "report", "somebody")


RECIPE = {
    "luthier": 1,
    "stages": {
        "base": {"uses": "base", "source": "embedded:nano-base"},
        "chats": {"uses": "data", "source": "chats.jsonl"},
        "tuned": {"uses": "sft", "model": "base", "data": "chats"},
    },
}


def keys(folder: Path, **top: Any) -> dict[str, str]:
    (folder / "chats.jsonl").write_text(json.dumps(chat("a", "b")) + "\n")
    made = plan(Recipe.from_mapping({**RECIPE, **top}, folder=folder), store=folder / "s")
    return {node.id: node.key for node in made.nodes.values()}


def test_the_date_is_part_of_the_keys_that_depend_on_it(tmp_path: Path) -> None:
    plain, first, second = keys(tmp_path), keys(tmp_path, date="2031-05-09"), keys(tmp_path, date="2031-05-10")
    assert plain["base"] == first["base"]
    assert plain["chats"] == first["chats"]
    assert len({plain["tuned"], first["tuned"], second["tuned"]}) == 3
    for wrong in ("tomorrow", "2031-02-30", 20310509):
        with pytest.raises(RecipeError, match="is no day"):
            keys(tmp_path, date=wrong)


def test_every_unused_key_is_named_in_a_fixed_order(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    rows = [chat("a", "b", **{f"key{n}": n for n in range(14)}), chat("c", "d", key3=1)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run_stage(tmp_path / "s", "data", {"source": str(source)})
    (warning,) = made.manifest["warnings"]
    assert warning.index("key3 (in 2 rows)") < warning.index("key0 (in 1 rows)") < warning.index("key13 (in 1 rows)")
    assert all(f"key{n} (" in warning for n in range(14))


def test_a_key_that_occurs_twice_is_a_bad_row(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "one", "content": "two"}]}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl:1: .*the key 'content' occurs twice"):
        run_stage(tmp_path / "s", "data", {"source": str(source), "format": "messages"})


def test_stop_tokens_are_numbers(tmp_path: Path) -> None:
    from luthier.api import ModelError
    from luthier.artifacts.texts import stop_token_ids

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "<|im_end|>"}')
    with pytest.raises(ModelError, match="is no id of a token"):
        stop_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert stop_token_ids(tmp_path) == [1, 2]
