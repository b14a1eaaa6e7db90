"""What the terminal shows of results."""

from __future__ import annotations

import io
from pathlib import Path

from luthier import Recipe, plan
from luthier.api import Artifact
from luthier.cli.display import summarize
from luthier.running.runner import RunResult, StageResult
from rich.console import Console


def test_small_numbers_have_as_many_digits_as_their_neighbours(tmp_path: Path) -> None:
    the_plan = plan(Recipe.from_mapping({"luthier": 1, "stages": {"x": {"uses": "base"}}}), tmp_path / "s")
    table = {"columns": ["norm"], "rows": [["layer 0", 0.0021], ["layer 1", 0.002], ["layer 2", None], ["all", 0.5]]}
    report = Artifact("0" * 64, "report", tmp_path, {"table": table}, {})
    out = io.StringIO()
    result = RunResult("run", the_plan, {"x": StageResult(the_plan.nodes["x"], "done", artifact=report)})
    summarize(result, Console(file=out, width=100))
    assert [line.split()[-1] for line in out.getvalue().splitlines()[-4:]] == ["0.0021", "0.0020", "-", "0.500"]
