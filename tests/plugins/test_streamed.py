"""Models read layer by layer: what the whole model computes, and never all of it in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_models import MODELS, make_gpt2, make_model
from luthier.modeling.loading import load_folder
from luthier.modeling.streamed import Streamed

TEXTS = [[3, 7, 11, 200, 5, 9, 40], [8, 1], list(range(2, 60)), [17], [4, 5, 6, 7, 8], list(range(40, 90))]
"""Some are of about one length: they go through the model together, padded."""


@pytest.mark.parametrize("name", [*MODELS, "gpt2", "gpt2-short"])
def test_every_architecture_is_computed_as_the_whole_model_is(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if name.startswith("gpt2"):
        make_gpt2(folder, short=name.endswith("short"))
    else:
        make_model(folder, name)
    whole = load_folder(folder).eval()
    streamed = Streamed(folder)
    # Twice: what was dropped is read again.
    for _ in range(2):
        found = dict(streamed.logits(TEXTS))
        assert sorted(found) == list(range(len(TEXTS)))
        for place, logits in found.items():
            with torch.no_grad():
                right = whole(torch.tensor([TEXTS[place]])).logits[0]
            torch.testing.assert_close(logits, right, rtol=1e-4, atol=2e-6)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
