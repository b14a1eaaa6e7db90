"""Planning: graph, keys, reasons, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from luthier import Recipe, plan
from luthier.api import RecipeError


def keys(recipe: Path, store: Path, *overrides: str) -> dict[str, str]:
    """Each stage's key."""
    return {name: node.key for name, node in plan(Recipe.load(recipe, overrides=overrides), store).nodes.items()}


def test_inputs_make_the_order_not_the_file(recipe: Path, tmp_path: Path) -> None:
    assert list(plan(Recipe.load(recipe), tmp_path / "s").nodes) == ["chats", "more"]


def test_keys_do_not_depend_on_ids_and_places(recipe: Path, tmp_path: Path) -> None:
    before = keys(recipe, tmp_path / "s")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "chats.jsonl").write_bytes((tmp_path / "chats.jsonl").read_bytes())
    moved = elsewhere / "other.yaml"
    moved.write_text(recipe.read_text().replace("chats:\n", "talks:\n").replace("data: chats", "data: talks"))
    after = keys(moved, tmp_path / "t")
    assert (before["chats"], before["more"]) == (after["talks"], after["more"])


def test_a_change_reaches_only_what_depends_on_it(recipe: Path, tmp_path: Path) -> None:
    before = keys(recipe, tmp_path / "s")
    below = keys(recipe, tmp_path / "s", "stages.more.method.count=21")
    above = keys(recipe, tmp_path / "s", "stages.chats.split.test=0.3")
    assert below["chats"] == before["chats"]
    assert below["more"] != before["more"]
    assert above["chats"] != before["chats"]
    assert above["more"] != before["more"]


def test_the_content_of_a_source_is_part_of_the_key(recipe: Path, chats: Path, tmp_path: Path) -> None:
    before = keys(recipe, tmp_path / "s")
    chats.write_text(chats.read_text().replace("say 3", "say three"))
    assert keys(recipe, tmp_path / "s")["chats"] != before["chats"]


def test_a_cycle_is_named(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        "luthier: 1\nstages:\n"
        "  a: {uses: augment, data: b, method: {uses: template, count: 1, templates: [{text: x}]}}\n"
        "  b: {uses: augment, data: a, method: {uses: template, count: 1, templates: [{text: x}]}}\n"
    )
    with pytest.raises(RecipeError, match=r"small.yaml:3: stages.a: .*a -> b -> a"):
        plan(Recipe.load(recipe), tmp_path / "s")


def test_unknown_stages_and_missing_files_come_with_line_and_remedy(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("data: chats", "data: chat"))
    with pytest.raises(RecipeError, match=r"small.yaml:6: stages.more.data: there is no stage 'chat'\n.*'chats'"):
        plan(Recipe.load(recipe), tmp_path / "s")
    recipe.write_text(recipe.read_text().replace("data: chat\n", "data: chats\n").replace("chats.jsonl", "none.jsonl"))
    with pytest.raises(RecipeError, match=r"small.yaml:17: stages.chats.source: .*'none.jsonl'"):
        plan(Recipe.load(recipe), tmp_path / "s")


def test_a_dataset_is_no_model(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "  m: {uses: merge, models: [chats, more]}\n")
    with pytest.raises(RecipeError, match="'chats' makes a dataset, but here a model or adapter is needed"):
        plan(Recipe.load(recipe), tmp_path / "s")
