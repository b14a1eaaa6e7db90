"""Planning: graph, keys, reasons, and what is refused before anything runs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from luthier import Recipe, plan
from luthier.api import RecipeError
from luthier.api.estimates import tokens_in
from luthier.artifacts.pace import note_pace
from luthier.artifacts.store import Store
from luthier.cli.run_verbs import plan_command


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
    with pytest.raises(RecipeError, match="'chats' makes a dataset, but here a model or an adapter is needed"):
        plan(Recipe.load(recipe), tmp_path / "s")


def test_problems_of_configs_and_between_stages_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        """\
luthier: 1
stages:
  base: {uses: base, sorce: x}
  chats: {uses: data, source: nofile.jsonl}
  tuned: {uses: sft, model: base, data: chts, adapter: lora}
  again: {uses: sft, model: tuned, data: chats, adapter: dora}
  named: {uses: evaluate, model: again, variant: Q4_K_M, data: ./none.jsonl}
  late: {uses: base, after: [./x]}
"""
    )
    with pytest.raises(RecipeError) as caught:
        plan(path, tmp_path / "s")
    told = str(caught.value)
    assert "many.yaml:3: stages.base.sorce: unknown key 'sorce'" in told
    assert "many.yaml:4: stages.chats.source: there is no file or folder 'nofile.jsonl'" in told
    assert "many.yaml:5: stages.tuned.data: there is no stage 'chts'" in told
    assert "many.yaml:6: stages.again: the model is an adapter already" in told
    assert "many.yaml:7: stages.named: `variant` names a file of an export" in told
    assert "many.yaml:7: stages.named.data: there is no file or folder './none.jsonl'" in told
    assert "many.yaml:8: stages.late.after: there is no stage './x'" in told
    # What was left out because of its own problem is not called unknown.
    assert "no stage 'base'" not in told


def test_a_first_plan_estimates_rows_tokens_and_memory(tmp_path: Path, chats: Path) -> None:
    path = tmp_path / "first.yaml"
    path.write_text(
        """\
luthier: 1
stages:
  base: {uses: base}
  chats: {uses: data, source: chats.jsonl, split: {test: 0.2}}
  tuned: {uses: sft, model: base, data: chats, epochs: 3}
  again: {uses: sft, model: tuned, data: chats, steps: 5, batch_size: 4}
"""
    )
    nodes = plan(path, tmp_path / "s").nodes
    assert nodes["tuned"].estimate.rows == 24
    assert 24 * 10 < (nodes["tuned"].estimate.tokens or 0) < 24 * 60
    assert nodes["again"].estimate.rows == 20
    weights = 16 * 2_623_744
    # Beside them activations, of as many tokens as a step has.
    for node in (nodes["tuned"], nodes["again"]):
        assert weights < (node.estimate.memory or 0) < 3 * weights
    assert (nodes["again"].estimate.memory or 0) < (nodes["tuned"].estimate.memory or 0)


def test_a_plan_tells_the_time_from_the_speed_of_the_last_training_of_its_kind(tmp_path: Path, chats: Path) -> None:
    path = tmp_path / "first.yaml"
    path.write_text(
        """\
luthier: 1
stages:
  base: {uses: base}
  chats: {uses: data, source: chats.jsonl}
  tuned: {uses: sft, model: base, data: chats, epochs: 3}
  lora: {uses: sft, model: base, data: chats, epochs: 3, adapter: lora}
"""
    )
    store = Store.at(tmp_path / "s")
    first = plan(path, store.root).nodes["tuned"]
    assert first.estimate.seconds is None
    assert first.estimate.work is not None
    kind, parameters = first.estimate.work
    # Measured on a model of half the size.
    note_pace(store.cache, kind, parameters // 2, 100.0)
    made = plan(path, store.root).nodes
    tokens = made["tuned"].estimate.tokens
    assert tokens
    assert made["tuned"].estimate.seconds == pytest.approx(tokens / 100 * 2)
    assert made["lora"].estimate.seconds is None
    shown = CliRunner().invoke(plan_command, [str(path), "--store", str(store.root)]).output
    line = next(line for line in shown.splitlines() if line.startswith("tuned"))
    assert f"{timedelta(seconds=round(tokens / 50))} at the speed of last time" in line
    # One that was cut off counts as none.
    file = next((store.cache / "pace").iterdir())
    file.write_text("{")
    assert plan(path, store.root).nodes["tuned"].estimate.seconds is None


def test_every_file_of_a_field_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typing import ClassVar

    from luthier.api import Component, FileSource, StageConfig
    from luthier.registry.registry import Provider, Registry

    class SeveralConfig(StageConfig):
        """Reads several files."""

        seeded: ClassVar[bool] = False
        files: list[FileSource]
        """The files."""

    class Plugin:
        """Hands over one stage."""

        def luthier_components(self) -> list[Component]:
            return [Component(kind="stage", name="several", summary="Several", config="x:y", impl="x:y")]

    from luthier.api import hookimpl

    Plugin.luthier_components = hookimpl(Plugin.luthier_components)
    registry = Registry()
    registry.add(Plugin(), Provider("several", "tests", "0"))
    from luthier_plugins import local

    registry.add(local, Provider("local", "tests", "0"))
    monkeypatch.setattr(
        Registry,
        "config_class",
        lambda self, component: SeveralConfig if component.name == "several" else _local_config(),
    )
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)

    def key(*files: str) -> str:
        recipe = {"luthier": 1, "stages": {"x": {"uses": "several", "files": list(files)}}}
        return plan(Recipe.from_mapping(recipe, folder=tmp_path, registry=registry), tmp_path / "s").nodes["x"].key

    assert len({key("a.txt", "b.txt"), key("c.txt", "b.txt"), key("b.txt", "a.txt"), key("b.txt")}) == 4


def _local_config() -> type:
    from luthier_plugins.local.config import LocalConfig

    return LocalConfig


def test_tokens_are_estimated_in_any_script() -> None:
    # "Natalia sold 48 clips." as Qwen 2.5 has it: Nat|alia| sold| |4|8| clips|.
    assert tokens_in("Natalia sold 48 clips.") == 5
    assert tokens_in("12345") == 3
    assert tokens_in("a\n\nb") == 3
    assert tokens_in("...!") == 2
    assert tokens_in("internationalisation") == 3
    assert tokens_in("请用中文回答") == 6
    assert tokens_in("") == 0


def test_a_limit_takes_its_share_of_a_file_s_characters(tmp_path: Path, chats: Path) -> None:
    path = tmp_path / "first.yaml"
    path.write_text(
        """\
luthier: 1
stages:
  base: {uses: base}
  all: {uses: data, source: chats.jsonl}
  some: {uses: data, source: chats.jsonl, limit: 5}
  one: {uses: sft, model: base, data: all}
  two: {uses: sft, model: base, data: some}
"""
    )
    nodes = plan(path, tmp_path / "s").nodes
    assert (nodes["one"].estimate.rows, nodes["two"].estimate.rows) == (10, 5)
    assert nodes["two"].estimate.tokens == pytest.approx((nodes["one"].estimate.tokens or 0) / 2, abs=5)


def test_a_plan_says_what_an_export_takes(tmp_path: Path) -> None:
    path = tmp_path / "out.yaml"
    path.write_text(
        """\
luthier: 1
stages:
  base: {uses: base}
  file: {uses: export, model: base, format: gguf}
  folder: {uses: export, model: base, format: hf}
  small: {uses: quantize, model: base, method: int8}
"""
    )
    nodes = plan(path, tmp_path / "s").nodes
    rows, block = 1024, 589_824
    assert nodes["base"].expected_facts["vocab_size"] == rows
    # A block in float32, which is larger than the embedding here, and logits of 512 tokens twice; of two models, more.
    assert nodes["file"].estimate.memory == 4 * block + 2 * 4 * 512 * rows
    both = 2 * 4 * block + 3 * 4 * 512 * rows
    assert nodes["folder"].estimate.memory == nodes["small"].estimate.memory == both


def test_training_waits_for_tests_but_never_in_a_cycle(tmp_path: Path, chats: Path) -> None:
    train = {"uses": "sft", "model": "base", "data": "rows", "steps": 1}
    stages = {
        "base": {"uses": "base"},
        "rows": {"uses": "data", "source": "chats.jsonl"},
        "one": train,
        "other": {**train, "steps": 2},
        "after-one": {"uses": "data", "source": "chats.jsonl", "split": "test", "after": ["one"]},
        "after-other": {"uses": "data", "source": "chats.jsonl", "split": "test", "limit": 3, "after": ["other"]},
        "apart": {"uses": "data", "source": "chats.jsonl", "split": "test", "limit": 2},
        "quality-one": {"uses": "evaluate", "model": "one", "data": "after-other"},
        "quality-other": {"uses": "evaluate", "model": "other", "data": "after-one"},
        "quality": {"uses": "evaluate", "model": "one", "data": "apart"},
    }
    made = plan(Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=tmp_path), tmp_path / "s")
    assert made.nodes["one"].tests == {"quality-one": "after-other", "quality": "apart"}
    assert made.nodes["other"].tests == {"quality": "apart"}
    order = list(made.nodes)
    assert order.index("apart") < order.index("one")
    assert order.index("other") < order.index("after-other") < order.index("one")
    assert "apart" in made.needed_for(["other"])
