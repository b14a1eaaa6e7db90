"""What of a test is in what is trained on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from luthier.api import Artifact
from luthier.data.leakage import Leakage, leakage
from luthier.testing import tiny_dataset


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(100_000)}" for _ in range(count))


def chat(prompt: str, answer: str, system: str = "", **more: Any) -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        **more,
    }


def pair(prompt: str, chosen: str) -> dict[str, Any]:
    told = [{"role": "assistant", "content": text} for text in (chosen, "no")]
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": told[:1], "rejected": told[1:]}


def found(folder: Path, trained: list[dict[str, Any]], tested: list[dict[str, Any]]) -> Leakage:
    train: list[Artifact] = [tiny_dataset(folder, trained)] if trained else []
    return leakage(train, tiny_dataset(folder, tested, split="test"))


LONG = words(0, 60)
CHANGED = " ".join(["other", *LONG.split()[1:30], "another", *LONG.split()[31:]])


@pytest.mark.parametrize(
    ("trained", "tested", "part"),
    [
        (chat(LONG, "a"), chat(LONG, "b"), "prompt"),
        (chat(f" {LONG.upper()}\n", "a"), chat(LONG, "b"), "prompt"),
        (chat(CHANGED, "a"), chat(LONG, "b"), "prompt"),
        (chat("q", f"Somebody wrote: {LONG}. So it is."), chat(LONG, "b"), "prompt"),
        (chat("q", LONG), chat("p", LONG), "answer"),
        (chat("how warm is it?", "a"), chat("How warm is it?", "b"), "prompt"),
        (pair("how warm is it?", "a"), chat("how warm is it?", "b"), "prompt"),
        (pair("q", LONG), chat("p", LONG), "answer"),
        ({"text": f"{words(1, 50)} {LONG} {words(2, 50)}"}, chat("p", LONG), "answer"),
        ({"text": LONG}, {"text": LONG}, "answer"),
        (chat("q", "a"), chat("q", "a"), "prompt"),
    ],
)
def test_what_is_tested_on_and_trained_on_leaks(tmp_path: Path, trained: Any, tested: Any, part: str) -> None:
    others = [chat(words(number, 30), words(-number, 30)) for number in range(1, 30)]
    schema = set(trained) - {"chosen", "rejected", "prompt"}
    more = others if "messages" in schema else []
    verdict = found(tmp_path, [*more, {**trained, "source": "a.jsonl:7"}], [{**tested, "source": "b.jsonl:9"}])
    assert (verdict.rows, verdict.leaking) == (1, 1)
    assert verdict.worst[0].part == part
    assert (verdict.worst[0].tested, verdict.worst[0].trained) == ("b.jsonl:9", "a.jsonl:7")
    assert Leakage.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize(
    ("trained", "tested"),
    [
        (chat(words(1, 60), "a"), chat(LONG, "a")),
        (chat("how warm is it?", "3"), chat("how cold is it?", "3")),
        (chat("q", words(1, 20)), chat("p", words(1, 20))),
        (chat("q", "a", system=LONG), chat("p", "b", system=LONG)),
        (chat(" ".join(LONG.split()[:20] + words(3, 40).split()), "a"), chat(LONG, "a")),
    ],
)
def test_what_only_looks_alike_does_not(tmp_path: Path, trained: Any, tested: Any) -> None:
    assert found(tmp_path, [trained], [tested]).leaking == 0


def test_the_form_of_a_task_is_none_of_its_rows(tmp_path: Path) -> None:
    form = words(5, 80)
    trained = [chat(f"{form} {words(number, 15)}", "yes") for number in range(50)]
    tested = [chat(f"{form} {words(number, 15)}", "yes") for number in range(40, 90)]
    verdict = found(tmp_path, trained, tested)
    assert verdict.leaking == 10
    assert sorted(leak.tested for leak in verdict.worst) == sorted(f"row {number}" for number in range(1, 11))


def test_nothing_leaks_where_nothing_is_trained_or_nothing_can_be_told(tmp_path: Path) -> None:
    assert found(tmp_path, [], [chat(LONG, "a")]).leaking == 0
    verdict = found(tmp_path, [chat("q", "a")], [{"text": "short"}, {"text": LONG}])
    assert (verdict.rows, verdict.leaking, verdict.unchecked) == (2, 0, 1)
