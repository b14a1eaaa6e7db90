"""Reading recipes: scalars, lines, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from luthier import Recipe
from luthier.api import RecipeError
from luthier.merging.api import cancel
from luthier.recipe.document import parse


def test_scalars_are_those_of_yaml_1_2() -> None:
    value = parse("a: no\nb: 1e-4\nc: on\nd: true\ne: 0.5\nf: 7\ng:\nh: '1'\n", "x.yaml").value
    assert value == {"a": "no", "b": 1e-4, "c": "on", "d": True, "e": 0.5, "f": 7, "g": None, "h": "1"}


def test_numbers_with_a_zero_in_front_are_decimal() -> None:
    assert parse("a: 010\nb: 08\nc: 0o10\nd: 1_000\ne: 0x1F\n", "x.yaml").value == {
        "a": 10,
        "b": 8,
        "c": 8,
        "d": 1000,
        "e": 31,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("luthier: 1\nstages: &a {base: *a}\n", "does an anchor contain itself"),
        ("luthier: 1\ntrackers: jsonl\nstages: {base: base}\n", "expected a list of trackers"),
        (
            "luthier: 1\nstages:\n  x: {uses: sft, model: m, data: d, learning_rate: .inf}\n",
            "no number that a recipe may have",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: augment, data: d, method: {uses: template, templates: [{text: a}], "
            "count: 1, slots: {n: {range: [5, 1]}}}}\n",
            "the range [5, 1] is empty",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: evaluate, model: m, data: d, require: {exact_mach: '> 0.5'}}\n",
            "exact_mach, which is not among `metrics`",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: evaluate, model: m, data: d, metrics: [exact_match, exact_match]}\n",
            "two metrics are called",
        ),
        ("luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], method: ties}\n", "name the models' ancestor"),
        ("luthier: 1\nstages:\n  x: {uses: merge, models: [a, b, c], method: slerp}\n", "takes 2 models, not 3"),
        ("luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], base: c}\n", "does not use a base"),
        ("luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], weights: [1, -1]}\n", "weights sum to zero"),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b, c], weights: [0.1, 0.2, -0.3]}\n",
            "weights sum to zero",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], base: c, weights: [1, -1], "
            "method: {uses: dare_linear, normalize: true}}\n",
            "weights sum to zero",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], weights: [1, -1], method: nuslerp}\n",
            "weights sum to zero",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b, c], base: c, weights: [1, 3, -1], method: ties}\n",
            "some of the weights cancel",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], weights: [1, 2], method: slerp}\n",
            "slerp does not use weights",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, models: [a, b], base: c, method: {uses: ties, "
            "density: {per_model: [0.5]}}}\n",
            "given `per_model`, but not for 2 models",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge, method: passthrough, "
            "slices: [{sources: [{model: a, layers: [0, 1], weight: 0.5}]}]}\n",
            "passthrough does not use weights",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge_adapters, models: [a, b, c], space: core, method: slerp}\n",
            "slerp cannot merge 3 adapters",
        ),
        (
            "luthier: 1\nstages:\n  x: {uses: merge_adapters, models: [a, b], space: core, "
            "method: {uses: fisher, data: d}}\n",
            "whole models do with data",
        ),
    ],
)
def test_bad_recipes_are_messages_and_no_tracebacks(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert message in str(caught.value)
    assert "value error" not in str(caught.value).lower(), "the words of the config alone"


def test_every_path_has_its_line() -> None:
    document = parse("a:\n  b:\n    - 1\n    - c: 2\n", "x.yaml")
    assert document.line(("a", "b", 1, "c")) == 4
    assert document.line(("a", "b", "nowhere")) == 2


@pytest.mark.parametrize(("text", "line"), [("a: [1,\n  2\nb: 3\n", 3), ("a: 1\na: 2\n", 2), ("a:\n\t- 1\n", 2)])
def test_yaml_that_does_not_parse_names_the_line(text: str, line: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.yaml")
    assert caught.value.problems[0].line == line
    assert caught.value.exit_code == 2


def test_all_problems_at_once_with_place_and_remedy(recipe: Path) -> None:
    text = recipe.read_text().replace("uses: data", "uses: dta").replace("count: 20", "cuont: many")
    recipe.write_text(text.replace("luthier: 1", "luthier: 2"))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe)
    found = {(problem.line, problem.path): problem for problem in caught.value.problems}
    assert found[1, "luthier"].message == "this Luthier reads recipe format 1"
    assert found[9, "stages.more.method.cuont"].hint == "did you mean 'count'?"
    assert found[16, "stages.chats.uses"].hint == "did you mean 'data'?"
    assert found[7, "stages.more.method.count"].message == "'count' is missing"


def test_a_wrong_type_says_what_was_given(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"small.yaml:9: stages.more.method.count: .*not 'lots'"):
        Recipe.load(recipe, overrides=["stages.more.method.count=lots"])


def test_an_override_replaces_one_value(recipe: Path) -> None:
    loaded = Recipe.load(recipe, overrides=["stages.chats.split.test=0.5", "seed=3"])
    assert loaded.stages["chats"].config.model_dump()["split"]["test"] == 0.5
    assert loaded.seed == 3


@pytest.mark.parametrize("override", ["stages.chats", "stages.nowhere.x=1", "stages.more.method.templates.9=1"])
def test_an_override_that_fits_nowhere_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        Recipe.load(recipe, overrides=[override])


def test_a_missing_requirement_names_the_remedy(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "requires: [luthier-no-such-plugin>=1]\n")
    with pytest.raises(RecipeError, match="pip install 'luthier-no-such-plugin>=1'"):
        Recipe.load(recipe)


def test_merge_keys_bring_in_what_an_anchor_holds() -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc:\n  <<: [*a, {x: 9, z: 4}]\n"
    value = parse(text, "x.yaml").value
    assert value["b"] == {"x": 1, "y": 3}
    assert value["c"] == {"x": 1, "y": 2, "z": 4}
    with pytest.raises(RecipeError, match=r"x\.yaml:2: b: '<<' takes a mapping"):
        parse("b:\n  <<: 3\n", "x.yaml")


@pytest.mark.parametrize(
    ("weights", "divisor", "expected"),
    [
        ([1, -1], "nothing", False),
        ([], "weights", False),
        ([0, 0], "weights", True),
        ([0, 0], "weights of changes", False),
        ([1, -1], "weights of changes", True),
        ([0, 0], "agreeing weights", False),
        ([1, -1, 1], "weights", False),
        ([1, -1, 1], "agreeing weights", True),
        ([1, 0.5, -0.7], "agreeing weights", False),
        ([0.7, 0.1, 0.2, -0.3], "agreeing weights", True),
        ([-1, -2], "agreeing weights", False),
        ([1e-9, 1e-9], "weights", False),
    ],
)
def test_weights_cancel_where_a_method_divides_by_them(weights: list, divisor: str, expected: bool) -> None:
    assert cancel(weights, divisor) is expected
