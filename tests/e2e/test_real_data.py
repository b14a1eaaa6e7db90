"""A few steps on real shell-command examples, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest
from luthier import run

DATA = Path(__file__).parents[3] / "shared" / "data" / "tldr-commands.jsonl"

RECIPE = """\
luthier: 1
name: commands
stages:
  base: {{uses: base}}
  commands: {{uses: data, source: {data}, limit: 1500, split: {{test: 0.05}}}}
  tuned: {{uses: sft, model: base, data: commands, steps: 60, learning_rate: 1e-3, batch_size: 16, max_length: 256}}
  quality: {{uses: evaluate, model: tuned, against: base, data: commands, metrics: [perplexity]}}
  file: {{uses: export, model: tuned, format: {{uses: gguf, types: [Q8_0]}}}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the real data is not here")
def test_perplexity_falls_on_real_commands(tmp_path: Path) -> None:
    (tmp_path / "commands.yaml").write_text(RECIPE.format(data=DATA))
    result = run(tmp_path / "commands.yaml", store=tmp_path / "s")
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    facts = result.artifact("quality").facts
    assert facts["scores"]["perplexity"] < 0.5 * facts["against"][0]["scores"]["perplexity"]
    assert result.artifact("file").facts["files"]["Q8_0"]["kl"] < 0.01
