"""What is run on GPUs works: on a CPU, with a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_training_is_measured() -> None:
    command = [sys.executable, str(Path(__file__).parent / "training.py"), "--size", "tiny", "--methods", "lora,dpo"]
    more = ["--rows", "6", "--batch", "2", "--micro", "1", "--tokens", "120"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if "tokens/s" in line]
    assert [line[0] for line in lines] == ["Luthier", "TRL", "TRL"] * 2, done.stdout + done.stderr[-2000:]
    assert "failed" not in done.stdout
    losses = [line[line.index("losses") + 1 :] for line in lines]
    # The same first losses: the same rows, and the same model.
    assert losses[0] == losses[1] == losses[2]
    assert losses[3][0] == losses[4][0] == losses[5][0] == "0.693"
