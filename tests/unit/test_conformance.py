"""Every component that comes with Luthier passes the check its plugin authors are given; bad ones do not."""

from __future__ import annotations

from typing import Any

import pytest
from luthier.api import Component
from luthier.merging.api import MergeMethod, MergeMethodConfig
from luthier.registry import default_registry
from luthier.testing import check_component
from luthier.testing.conformance import findings_of

VALUES: dict[str, dict[str, Any]] = {
    "stage-adapter": {"source": "./adapter", "model": "b"},
    "stage-augment": {"row_schema": "text", "method": {"uses": "template", "templates": [{"text": "a"}], "count": 1}},
    "stage-base": {"source": "./model"},
    "stage-data": {"source": "rows.jsonl"},
    "stage-dpo": {"model": "m", "data": "d"},
    "stage-kto": {"model": "m", "data": "d"},
    "stage-evaluate": {"model": "m", "data": "d"},
    "stage-export": {"model": "m"},
    "stage-lm_eval": {"model": "m", "tasks": "t"},
    "stage-init": {"data": ["d"]},
    "stage-merge": {"models": ["a", "b"]},
    "stage-merge_adapters": {"models": ["a", "b"]},
    "stage-extract_lora": {"model": "a", "base": "b", "r": 4},
    "stage-moe": {"base": "b", "experts": [{"model": "a"}, {"model": "b"}], "router": "uniform"},
    "stage-search": {"models": ["a", "b"], "data": "d"},
    "stage-diff": {"models": ["a", "b"]},
    "stage-mix": {"data": ["a", "b"]},
    "stage-orpo": {"model": "m", "data": "d"},
    "stage-pretrain": {"model": "m", "data": ["d"]},
    "stage-quantize": {"model": "m", "method": "int8"},
    "generator-model": {"model": "m"},
    "augmenter-answer": {"generator": {"uses": "model", "model": "m"}},
    "augmenter-paraphrase": {"generator": {"uses": "model", "model": "m"}},
    "augmenter-back_translate": {"generator": {"uses": "model", "model": "m"}},
    "augmenter-synthesize": {"generator": {"uses": "model", "model": "m"}, "instruction": "Greet.", "count": 1},
    "augmenter-edits": {"lower": 1.0},
    "augmenter-filter": {"rule": "answer | length > 0"},
    "generator-llama": {"path": "./model.gguf"},
    "generator-openai": {"url": "http://127.0.0.1:1", "model": "m"},
    "tracker-wandb": {"mode": "offline"},
    "stage-sft": {"model": "m", "data": "d"},
    "metric-regex": {"pattern": "a"},
    "metric-code_runs": {"allow": True, "tests": None},
    "metric-judge": {"generator": {"uses": "model", "model": "m"}},
    "metric-win_rate": {"generator": {"uses": "model", "model": "m"}},
    "metric-json_schema": {"json_schema": {"type": "object"}},
    "merge_method-fisher": {"data": "d"},
    "regularizer-ewc": {"data": "d", "rows": 2},
    "merge_method-regmean": {"data": "d"},
    "augmenter-template": {
        "templates": [{"messages": [{"role": "user", "content": "{{ n }}"}, {"role": "assistant", "content": "ok"}]}],
        "slots": {"n": {"range": [1, 9]}},
        "count": 3,
    },
}


ASKING = {f"augmenter-{name}" for name in ("answer", "paraphrase", "back_translate", "synthesize")} | {
    "metric-judge",
    "metric-win_rate",
}
"""What needs somebody who answers; their own tests have such."""


@pytest.mark.parametrize(
    "component", [component for component, _ in default_registry()], ids=lambda item: f"{item.kind}-{item.name}"
)
def test_built_in_components_conform(component: Component) -> None:
    name = f"{component.kind}-{component.name}"
    if name not in ASKING:
        check_component(component, VALUES.get(name))
        return
    *found, behaves = findings_of(component, VALUES[name])
    assert [item.problem for item in found] == [None] * len(found)
    assert behaves.check == "it behaves on a small example"


class Undocumented(MergeMethodConfig):
    """A config with a silent field."""

    strength: float = 1.0


class Spec(MergeMethodConfig):
    """Nothing to choose."""


class Changer(MergeMethod[Spec]):
    """A merge method that changes its inputs."""

    granularity = "elementwise"

    def merge(self, part: Any) -> Any:
        return part.tensors[0].mul_(0.5)


class Renamed(Changer):
    """A merge method with other parameters."""

    def merge(self, models: Any, shares: Any) -> Any:
        return models[0]


@pytest.mark.parametrize(
    ("config", "impl", "message"),
    [
        (Undocumented, Changer, "these fields have no docstring: strength"),
        (Spec, Changer, "the inputs were changed"),
        (Spec, Renamed, r"merge takes \(self, models, shares\), expected \(self, part\)"),
    ],
)
def test_what_is_wrong_is_named(
    config: type, impl: type, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    module = tmp_path / "a_bad_plugin.py"
    module.write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import a_bad_plugin  # pyright: ignore

    monkeypatch.setattr(a_bad_plugin, "C", config, raising=False)
    monkeypatch.setattr(a_bad_plugin, "I", impl, raising=False)
    component = Component(
        kind="merge_method", name="bad", summary="Bad", config="a_bad_plugin:C", impl="a_bad_plugin:I"
    )
    with pytest.raises(AssertionError, match=message):
        check_component(component)
