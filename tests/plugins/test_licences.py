"""A licence stays with a model, whatever is made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.api import Artifact
from luthier.testing import resealed, run_stage, tiny_dataset, tiny_model

TEXT = ["Where is the letter?", "in the drawer"] * 4


def with_licence(store: Path, name: str, text: str, seed: int) -> Artifact:
    """A model from outside with a licence."""
    made = tiny_model(store, texts=TEXT, seed=seed)
    folder = store / name
    shutil.copytree(made.path, folder)
    (folder / "manifest.json").unlink()
    (folder / "LICENSE").write_text(text)
    (folder / "NOTICE.txt").write_text("by a friend")
    return run_stage(store, "base", {"source": str(folder)})


def test_a_licence_stays_with_what_is_made_of_a_model(tmp_path: Path) -> None:
    base = with_licence(tmp_path, "one", "do no harm", 1)
    turns = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": TEXT[1]}]
    data = tiny_dataset(tmp_path, [{"messages": turns}] * 4)
    options = {"steps": 2, "learning_rate": 1e-3}
    inputs = {"model": base, "data": [data]}
    full = run_stage(tmp_path, "sft", options, inputs=inputs)
    adapter = run_stage(tmp_path, "sft", options | {"adapter": {"uses": "lora", "r": 4}}, inputs=inputs)
    for made in (full, adapter):
        for form in ({"uses": "hf"}, {"uses": "gguf"}):
            export = run_stage(tmp_path, "export", {"format": form}, inputs={"model": made})
            assert (export.path / "LICENSE").read_text() == "do no harm"
            assert (export.path / "NOTICE.txt").exists()
    assert (
        "LICENSE"
        in (run_stage(tmp_path, "export", {"format": "hf"}, inputs={"model": full}).path / "SHA256SUMS").read_text()
    )


def test_a_merge_has_the_licences_of_all_models(tmp_path: Path) -> None:
    models = [with_licence(tmp_path, "one", "do no harm", 1), with_licence(tmp_path, "two", "do as you like", 2)]
    merged = run_stage(tmp_path, "merge", {"models": ["one", "two"], "method": "linear"}, inputs={"models": models})
    found = {path.read_text() for path in merged.path.glob("LICENSE*")}
    assert found == {"do no harm", "do as you like"}
    assert len(list(merged.path.glob("NOTICE*"))) == 1


def test_experts_and_adapters_bring_their_licences(tmp_path: Path) -> None:
    models = [with_licence(tmp_path, "one", "do no harm", 1), with_licence(tmp_path, "two", "do as you like", 2)]
    config = {"router": "uniform", "experts": [{}, {}], "experts_per_token": 2}
    inputs = {"base": models[0], "experts.0.model": models[0], "experts.1.model": models[1]}
    experts = run_stage(tmp_path, "moe", config, inputs=inputs)
    assert {path.read_text() for path in experts.path.glob("LICENSE*")} == {"do no harm", "do as you like"}
    turns = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": TEXT[1]}]
    data = tiny_dataset(tmp_path, [{"messages": turns}] * 4)
    options = {"adapter": {"uses": "lora", "r": 4}, "learning_rate": 1e-3}
    light = [
        run_stage(tmp_path, "sft", options | {"steps": steps}, inputs={"model": models[0], "data": [data]})
        for steps in (1, 2)
    ]
    (light[1].path / "LICENSE").write_text("mine")
    light[1] = resealed(light[1].path)
    both = run_stage(tmp_path, "merge_adapters", inputs={"models": light})
    assert {path.read_text() for path in both.path.glob("LICENSE*")} == {"do no harm", "mine"}
