"""People judge answers: nothing on the page says whose they are, and their verdicts are counted right."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from luthier.api import Artifact, Completion, DataError, Row
from luthier.cli.compare import server_of
from luthier.modeling.generate import TransformersGenerator
from luthier.reporting.judging_page import page
from luthier.reporting.statistics import mcnemar
from luthier.reporting.verdicts import Comparison, comparison_of, outcome, read_verdicts, told, written
from luthier.testing import run_stage, tiny_dataset, tiny_model
from sklearn.metrics import cohen_kappa_score

CHROMIUM = shutil.which("chromium")
COUNT = 12


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Artifact:
    """Two models' answers to twelve rows, of which two are alike."""
    names = iter(["mine", "other"])

    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        name = next(names)
        for request in requests:
            n = int(request[-1]["content"][1:])
            yield [Completion("alike" if n in (3, 7) else f"</script><b>{'good' if name == 'mine' else 'bad'}</b> {n}")]

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    rows: list[Row] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "b"}]}
        for n in range(COUNT)
    ]
    models = {"model": tiny_model(tmp_path), "against": [tiny_model(tmp_path, seed=1)]}
    return run_stage(tmp_path, "evaluate", {}, inputs={**models, "data": tiny_dataset(tmp_path, rows, split="test")})


def favouring(comparison: Comparison, word: str, **other: str) -> dict[int, str]:
    """Verdicts of somebody who prefers answers with a word; by row, another verdict."""
    return {
        pair.row: other.get(f"row{pair.row}", "left" if word in pair.left else "right") for pair in comparison.pairs
    }


def test_pairs_are_drawn_and_say_nothing_of_whose_they_are(report: Artifact) -> None:
    found = comparison_of(report, 1, 0, None)
    assert sorted(pair.row for pair in found.pairs) == [n + 1 for n in range(COUNT) if n not in (3, 7)]
    assert [pair.row for pair in found.pairs] != sorted(pair.row for pair in found.pairs)
    sides = {pair.row: pair.swapped for pair in found.pairs}
    assert set(sides.values()) == {True, False}
    for pair in found.pairs:
        assert ("good" in pair.right) == pair.swapped
    assert comparison_of(report, 1, 0, None) == found
    other = comparison_of(report, 1, 1, None)
    assert {pair.row: pair.swapped for pair in other.pairs} != sides
    assert other.digest != found.digest
    assert len(comparison_of(report, 1, 0, 4).pairs) == 4
    text = page(found)
    assert "swapped" not in text
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(rf"\b{found.ours}\b|{report.key}", shown)
    assert "</script><b>" not in text, "an answer does not end the script that holds it"
    with pytest.raises(DataError, match="has no comparison 2: it has 1"):
        comparison_of(report, 2, 0, None)


def test_verdicts_are_counted_from_whichever_side(report: Artifact) -> None:
    found = comparison_of(report, 1, 0, None)
    one = favouring(found, "good", row1="tie", row2="skip")
    two = favouring(found, "good", row1="bad", row5="left", row6="right")
    made = outcome(found, [("Ann", one), ("Bob", two)])
    assert (made.bad, made.skipped) == (1, 0)
    swapped = {pair.row: pair.swapped for pair in found.pairs}
    # Rows 5 and 6: what Bob says there is for the model where that is its side.
    split = (not swapped[5]) + swapped[6]
    assert made.won == 7 + split
    assert made.lost == 0
    assert made.neither == 10 - made.won
    assert made.rate.value == pytest.approx((made.won + 0.5 * made.neither) / 10)
    assert made.p == mcnemar(made.won, 0)
    ((_, _, count, share, kappa),) = made.agreement
    rows = [row for row in one if one[row] != "skip"]

    def plain(verdicts: dict[int, str], row: int) -> str:
        verdict = verdicts[row]
        return "neither" if verdict in ("tie", "bad") else "mine" if (verdict == "left") != swapped[row] else "other"

    labels = [[plain(some, row) for row in rows] for some in (one, two)]
    assert count == 9
    assert share == pytest.approx(sum(map(str.__eq__, *labels)) / 9)
    assert kappa == pytest.approx(cohen_kappa_score(*labels))
    lines = told(found, made)
    assert any("Ann and Bob agree on" in line for line in lines)
    even = outcome(found, [("Ann", {pair.row: "left" for pair in found.pairs})])
    assert "neither of them is shown to be better" in told(found, even)
    with pytest.raises(DataError, match="no pair was judged"):
        outcome(found, [("Ann", {})])


def test_files_of_verdicts_that_are_none(report: Artifact) -> None:
    found = comparison_of(report, 1, 0, None)
    text = written(found, "Ann", favouring(found, "good"))
    assert read_verdicts(text, found, "f") == ("Ann", favouring(found, "good"))
    about = json.loads(text)
    for bad, match in (
        ("[1", "no file of verdicts"),
        ("[]", "no file of verdicts"),
        (json.dumps({**about, "kind": "x"}), "no file of verdicts"),
        (json.dumps({**about, "of": "x"}), "about other pairs"),
        (json.dumps({**about, "verdicts": {"1": "best"}}), "verdicts that no page gives"),
        (json.dumps({**about, "verdicts": {"4": "left"}}), "verdicts that no page gives"),
        (json.dumps({**about, "verdicts": {"x": "left"}}), "verdicts that no page gives"),
    ):
        with pytest.raises(DataError, match=match):
            read_verdicts(bad, found, "f")


@contextmanager
def served(found: Comparison, folder: Path, judge: str = "") -> Iterator[str]:
    with server_of(found, folder, judge, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def ask(url: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, None if body is None else body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_each_verdict_is_kept_at_once_and_only_the_page_may_give_one(report: Artifact, tmp_path: Path) -> None:
    found = comparison_of(report, 1, 0, None)
    folder = tmp_path / "verdicts"
    with served(found, folder) as url:
        assert "Which answer is better?" in ask(f"{url}/")[1]
        assert ask(f"{url}/outcome") == (200, "no pair was judged")
        some = dict(list(favouring(found, "good").items())[:3])
        assert ask(f"{url}/verdicts", written(found, "Ann B/../c", some)) == (200, "kept")
        (kept,) = folder.glob("*.json")
        assert kept.name == f"{found.digest}-Ann_B_c.json"
        assert read_verdicts(kept.read_text(), found, "f") == ("Ann B/../c", some)
        assert "won 3, lost 0" in ask(f"{url}/outcome")[1]
        assert ask(f"{url}/verdicts", written(found, "Eve", some), Origin="http://evil.example")[0] == 403
        assert ask(f"{url}/verdicts", written(found, "Eve", some), Host="evil.example")[0] == 403
        assert ask(f"{url}/verdicts", "{}")[0] == 400
        assert ask(f"{url}/etc/passwd")[0] == 404
        assert len(list(folder.iterdir())) == 1
    with served(found, folder, "Ann B/../c") as url:
        data = re.search(r"id=pairs>(.*?)</script>", ask(f"{url}/")[1])
        assert data is not None
        assert json.loads(data[1])["known"] == {str(row): verdict for row, verdict in some.items()}


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is here")
def test_a_browser_judges_by_keys_and_goes_back(report: Artifact, tmp_path: Path) -> None:
    found = comparison_of(report, 1, 0, None)
    presses = ["ArrowLeft", "ArrowRight", "t", "b", "ArrowUp", "s", *["ArrowLeft"] * 6]
    # Somebody at the page's keyboard, who then looks at what would be saved.
    press = f"""<script>(async () => {{
      for (const key of {json.dumps(presses)}) {{
        document.dispatchEvent(new KeyboardEvent("keydown", {{key, bubbles: true}}));
        await new Promise(done => setTimeout(done, 60));
      }}
      document.getElementById("outcome").textContent = file();
    }})();</script>"""
    path = tmp_path / "page.html"
    path.write_text(page(found, "Kim").replace("</html>", f"{press}</html>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "10 of 10 judged" in done.stdout
    assert '<div id="judging" hidden="">' in done.stdout
    saved = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert saved is not None
    wanted = ["left", "right", "tie", "skip", *["left"] * 6]
    order = {pair.row: verdict for pair, verdict in zip(found.pairs, wanted, strict=True)}
    assert read_verdicts(html.unescape(saved[1]), found, "saved") == ("Kim", order)
