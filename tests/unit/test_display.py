"""What the terminal shows of results."""

from __future__ import annotations

import io
from pathlib import Path

from luthier import Recipe, plan
from luthier.api import Artifact
from luthier.cli.display import Display, summarize
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


def shown_piped(steps: int, seconds: float) -> list[str]:
    """What a run of so many steps shows where its output is piped."""
    now = 0.0
    out = io.StringIO()
    display = Display(Console(file=out, width=200), clock=lambda: now)
    with display:
        display({"event": "stage_started", "stage": "tuned", "status": "run", "reason": "new"})
        for step in range(1, steps + 1):
            now += seconds
            display({"event": "progress", "stage": "tuned", "done": step, "total": steps, "unit": "steps"})
            values = {"loss": 1 / step, "learning_rate": 1e-5, "tokens_per_second": 123.4}
            display({"event": "metrics", "stage": "tuned", "step": step, "values": values})
        display({"event": "stage_finished", "stage": "tuned"})
    return out.getvalue().splitlines()[1:]


def test_piped_there_is_a_line_of_metrics_in_ten_seconds_at_most_and_the_last_one() -> None:
    lines = shown_piped(100, 0.5)
    assert len(lines) == 6
    assert lines[0].startswith("tuned: step 1: loss 1")
    assert lines[-1].startswith("tuned: step 100: loss 0.01")
    # Half a second a step: step 21 comes ten seconds after the first, and 79 are left.
    assert lines[1] == "tuned: step 21: loss 0.04762, learning_rate 1e-05, tokens_per_second 123.4, 0:00:40 left"
    assert len(shown_piped(5, 60)) == 5


def test_on_a_terminal_the_line_has_loss_rate_speed_and_time_left() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=160, force_terminal=True))
    with display:
        display({"event": "stage_started", "stage": "tuned", "status": "run", "reason": "new"})
        display({"event": "progress", "stage": "tuned", "done": 3, "total": 9, "unit": "steps"})
        values = {"loss": 0.25, "learning_rate": 1e-5, "tokens_per_second": 1234.4}
        display({"event": "metrics", "stage": "tuned", "step": 3, "values": values})
        display._progress.refresh()  # pyright: ignore[reportPrivateUsage]
    text = out.getvalue()
    assert "loss 0.25, lr 1e-05, tokens/s 1234" in text
    assert "-:--:--" in text, "a place for the time that is left"
