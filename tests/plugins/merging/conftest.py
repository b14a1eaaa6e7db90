"""The models that most tests of merging take."""

from __future__ import annotations

from pathlib import Path

import pytest
from luthier.api import Artifact
from luthier.testing import run_stage, tiny_dataset, tiny_model

CHATS = [{"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}]}] * 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def models(store: Path) -> list[Artifact]:
    """Three models with other weights, stored in bfloat16."""
    return [tiny_model(store, seed=seed, dtype="bfloat16") for seed in range(3)]


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, store: Path, models: list[Artifact]) -> Artifact:
    """A trained adapter on the first model."""
    config = {"adapter": {"uses": request.param, "r": 4}, "steps": 4, "learning_rate": 0.05}
    data = tiny_dataset(store, CHATS)
    return run_stage(store, "sft", config, inputs={"model": models[0], "data": [data]})
