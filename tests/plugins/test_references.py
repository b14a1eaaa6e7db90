"""Weights by reference: no second place on the disk, and nothing silent when what they refer to changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from luthier import Recipe, plan, run
from luthier.api import LuthierError, ModelError, RecipeError
from luthier.artifacts import links
from luthier.artifacts.store import Store
from luthier.testing import run_stage, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, as a user has it."""
    made = tiny_model(tmp_path / "made", tied=False)
    shutil.copytree(made.path, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    return tmp_path / "model"


def recipe(folder: Path, **settings: object) -> Recipe:
    """The model, and one made from it."""
    stages = {
        "base": {"uses": "base", "source": "./model", **settings},
        "soup": {"uses": "merge", "models": ["base"], "method": "passthrough", "dtype": "float32"},
    }
    return Recipe.from_mapping({"luthier": 1, "name": "refers", "stages": stages}, folder=folder)


def changed(file: Path) -> None:
    """Change a byte of the last tensor in place: the same size, another time."""
    with file.open("r+b") as opened:
        opened.seek(-3, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-3, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))


def test_weights_are_linked_and_texts_are_copied(folder: Path, tmp_path: Path) -> None:
    result = run(recipe(tmp_path), store=tmp_path / "s")
    made = result.artifact("base")
    assert (made.path / WEIGHTS).samefile(folder / WEIGHTS)
    assert made.facts["references"] == {WEIGHTS: {"how": "hard link", "place": str(folder / WEIGHTS)}}
    assert not (made.path / "config.json").samefile(folder / "config.json")
    # A hard link outlives the folder.
    shutil.rmtree(folder)
    store = Store.at(tmp_path / "s")
    assert store.resolve("refers/base").key == made.key
    assert store.damage(made, anew=True) is None


def test_a_copy_is_made_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    first = run(recipe(tmp_path), store=tmp_path / "s")
    asked = recipe(tmp_path, copy_weights=True)
    nodes = plan(asked, tmp_path / "s").nodes
    assert (nodes["base"].status, nodes["soup"].status) == ("run", "cached")
    assert "`copy_weights` asks for a copy" in nodes["base"].reason
    again = run(asked, store=tmp_path / "s")
    made = again.artifact("base")
    assert made.key == first.artifact("base").key
    assert not (made.path / WEIGHTS).samefile(folder / WEIGHTS)
    assert "references" not in made.facts
    assert plan(asked, tmp_path / "s").nodes["base"].status == "cached"
    # Who does not ask is content with it.
    assert plan(recipe(tmp_path), tmp_path / "s").nodes["base"].status == "cached"
    # What comes with Luthier goes with it.
    stages = {"nano": {"uses": "base"}}
    nano = run(Recipe.from_mapping({"luthier": 1, "stages": stages}), store=tmp_path / "s").artifact("nano")
    assert "references" not in nano.facts
    assert not (nano.path / WEIGHTS).is_symlink()
    assert (nano.path / WEIGHTS).stat().st_nlink == 1


def test_a_source_that_changed_is_another_model_and_the_old_one_says_so(folder: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "s")
    first = run(recipe(tmp_path), store=store)
    changed(folder / WEIGHTS)
    with pytest.raises(LuthierError, match=rf"another content .* it is {folder}/{WEIGHTS} by reference") as told:
        store.resolve("refers/base")
    assert "run its recipe again" in str(told.value.hint)
    # What was made of it stays, and the recipe makes what is new.
    assert store.resolve("refers/soup").key == first.artifact("soup").key
    again = run(recipe(tmp_path), store=store)
    assert again.exit_code == 0
    assert again.artifact("soup").key != first.artifact("soup").key
    # Written over with another size, it is seen without reading it.
    (folder / WEIGHTS).write_bytes(b"x")
    assert "has 1 bytes" in str(store.broken(again.artifact("base").key))


def test_an_adapter_s_base_is_looked_at_too(folder: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "s")
    stages = {
        "base": {"uses": "base", "source": "./model"},
        "rows": {"uses": "data", "source": "./rows.jsonl"},
        "light": {"uses": "sft", "model": "base", "data": "rows", "steps": 1, "adapter": {"uses": "lora", "r": 2}},
    }
    row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    result = run(Recipe.from_mapping({"luthier": 1, "name": "refers", "stages": stages}, folder=tmp_path), store=store)
    assert result.exit_code == 0
    assert store.resolve("refers/light").kind == "adapter"
    changed(folder / WEIGHTS)
    with pytest.raises(LuthierError, match=f"{folder}/{WEIGHTS} by reference"):
        store.resolve("refers/light")


def test_what_belongs_to_a_cache_is_only_linked_to(folder: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "s")
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    shutil.move(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to(Path("..") / "blobs" / "0123")
    made = run(recipe(tmp_path), store=store).artifact("base")
    assert made.facts["references"] == {WEIGHTS: {"how": "link", "place": str(blob)}}
    assert (made.path / WEIGHTS).readlink() == blob
    # Pruned: what is in the store says so, and so does the folder.
    blob.unlink()
    assert f"{WEIGHTS} is missing: it is {blob} by reference" in str(store.broken(made.key))
    with pytest.raises(ModelError, match=r"is a link to .*0123, which is not there"):
        run_stage(store.root, "base", {"source": str(folder)})
    with pytest.raises(RecipeError, match="which is not there"):
        plan(recipe(tmp_path), store)


def test_another_file_system_gets_a_link(folder: Path, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    place = shared / f"luthier-{os.getpid()}"
    try:
        shutil.copytree(folder, place)
        made = run_stage(tmp_path / "s", "base", {"source": str(place)})
        assert made.facts["references"][WEIGHTS] == {"how": "link", "place": str(place / WEIGHTS)}
    finally:
        shutil.rmtree(place)
    assert "is missing" in str(made.damage())


def test_two_recipes_that_refer_to_one_folder_share_it(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o555)
    try:
        first = run(recipe(tmp_path), store=tmp_path / "s")
        other = Recipe.from_mapping(
            {"luthier": 1, "name": "other", "stages": {"mine": {"uses": "base", "source": str(folder)}}}
        )
        second = run(other, store=tmp_path / "s")
    finally:
        folder.chmod(0o755)
    assert first.artifact("base").key == second.artifact("mine").key
    assert second.stages["mine"].outcome == "cached"


def test_blocks_are_shared_where_the_file_system_can(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system here may not be able to: then the request is refused, and nothing is left of it."""
    target = tmp_path / "target"
    how = links.refer(folder / WEIGHTS, target)
    assert how in ("reflink", "hard link")
    assert target.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert target.samefile(folder / WEIGHTS) == (how == "hard link")


def test_large_files_are_read_once_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.artifacts import store as stores
    from luthier.artifacts.digest import digest_file

    monkeypatch.setattr(stores, "LARGE", 10)
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (5 if number == 2 else 3_000_000))
    place = Store.at(tmp_path / "s")
    told: list[tuple[int, int]] = []
    place.digest_large(paths, lambda done, total: told.append((done, total)))
    assert told[-1] == (6_000_000, 6_000_000)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert place.digest_source(paths[0]) == digest_file(paths[0])
    told.clear()
    place.digest_large(paths, lambda done, total: told.append((done, total)))
    assert told == []
    # A link to it, or a hard link that was remembered, is the same file.
    (tmp_path / "link").symlink_to(paths[0])
    place.digest_large([tmp_path / "link"], lambda done, total: told.append((done, total)))
    assert told == []
