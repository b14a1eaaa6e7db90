"""The report on a dataset: each odd thing is found in its rows, and in no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from luthier.api import Row
from luthier.data.examine import Examination, Finding, examine
from luthier.reporting.charts import histogram
from luthier.reporting.data_page import page
from luthier.testing import tiny_dataset


def talk(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


PLAIN = [talk(f"What is the number behind {n} in the long list of these?", f"It is {n + 1}.") for n in range(40)]
TEXT = "The kite goes up when the wind is strong enough, and it comes down again when there is none of it left"


def found(folder: Path, rows: Sequence[Row], **config: Any) -> Examination:
    return examine(tiny_dataset(folder, rows, **config))


def finding(examination: Examination, name: str) -> Finding | None:
    return next((item for item in examination.findings if name in item.name), None)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PLAIN[3], "rows that are the same as another"),
        (talk(f"{TEXT}?", f"{TEXT} now."), "nearly the same"),
        (talk(PLAIN[5]["messages"][0]["content"], "It is another."), "answer a prompt in another way"),
        (talk("Where is it?", "I'm sorry, but I cannot tell that."), "answers that refuse"),
        (talk("Where is it?", "As an AI language model I have no place."), "answers that refuse"),
        (talk("Where in the world is it?", "Where in the world is it? In Oslo."), "repeat the prompt"),
        (talk("Who?", "Write to ann.lee@post.no."), "an e-mail address"),
        (talk("Who?", "Call +47 22 33 44 55."), "a phone number"),
        (talk("Who?", "Take sk-abcdefghijklmnopqrstuvwx."), "a key"),
        (talk("How?", "Like this:\n```python\nprint('a'\n```\nDone."), "code that does not parse"),
        (talk("How?", "Like this:\n```json\n{'a': 1}\n```\nDone."), "code that does not parse"),
        (talk("How?", "Like this:\n```python\nprint('a')\n"), "code that does not parse"),
        (talk("Where is it?", "it is there."), "do not begin with a capital letter"),
        (talk("Where is it?", "It is there"), "do not end with a punctuation mark"),
        (talk("Where is it?", "It is **there**."), "have Markdown"),
        (talk("Where is it?", "It is there.\n"), "have white space at an end"),
    ],
)
def test_what_is_odd_is_found_where_it_is(tmp_path: Path, row: Row, name: str) -> None:
    rows = [*PLAIN[:20], talk(f"{TEXT}?", f"{TEXT}."), *PLAIN[20:]]
    assert finding(found(tmp_path / "plain", rows), name) is None
    odd = finding(found(tmp_path / "odd", [*rows, row]), name)
    assert odd is not None
    assert odd.count == 1
    assert [example.place for example in odd.examples] == ["train 42"]
    assert odd.advice


@pytest.mark.parametrize(
    "answer",
    [
        "Like this:\n```python\nprint('a')\n```\nAnd:\n```json\n{\"a\": [1]}\n```\nDone.",
        "Like this:\n```rust\nfn main( {\n```\nDone.",
        "Room 22 33 44 of 1990-2020 costs 1,234,567.89.",
        "Write to nobody@example.com.",
        "Sorry is a word of five letters.",
    ],
)
def test_what_is_not_odd_is_not_found(tmp_path: Path, answer: str) -> None:
    examination = found(tmp_path, [*PLAIN, talk("How is this?", answer)])
    assert [item.name for item in examination.findings if "Markdown" not in item.name] == []


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    examination = found(tmp_path, [*PLAIN, talk("Who?", "Take sk-abcdefghijklmnopqrstuvwx.")])
    key = finding(examination, "a key")
    assert key is not None
    assert key.examples[0].text == "sk-...wx"


@pytest.mark.parametrize(("long", "name"), [(True, "longer"), (False, "shorter"), (None, None)])
def test_length_bias_of_pairs(tmp_path: Path, long: bool | None, name: str | None) -> None:
    def pair(n: int) -> Row:
        more = n % 2 == 0 if long is None else long
        sides = [f"It is {n}, and that is all of it.", f"It is {n}."]
        chosen, rejected = sides if more else sides[::-1]
        return {"prompt": [{"role": "user", "content": f"Which number {n}?"}],
                **{side: [{"role": "assistant", "content": text}]
                   for side, text in (("chosen", chosen), ("rejected", rejected))}}  # fmt: skip

    examination = found(tmp_path, [pair(n) for n in range(20)])
    bias = finding(examination, "pairs whose chosen answer")
    assert (bias is None) == (name is None)
    if bias is not None and name is not None:
        assert name in bias.name
        assert (bias.count, bias.of) == (20, 20)


def test_pairs_of_one_length_are_no_bias(tmp_path: Path) -> None:
    sides = {
        side: [{"role": "assistant", "content": f"{letter}."}] for side, letter in (("chosen", "A"), ("rejected", "B"))
    }
    rows: list[Row] = [{"prompt": [{"role": "user", "content": f"Which {n}?"}], **sides} for n in range(5)]
    assert finding(found(tmp_path, rows), "pairs whose chosen answer") is None


def test_lengths_roles_and_languages_are_those_of_the_rows(tmp_path: Path) -> None:
    german = talk("Wie hoch ist der Berg, der hinter der alten Stadt steht?", "Er ist ungefähr so hoch wie der Turm.")
    examination = found(tmp_path, [*PLAIN, german], test=[PLAIN[0]])
    assert examination.rows == {"train": 41, "test": 1}
    assert examination.lengths["turns"].tolist() == [2] * 42
    assert examination.lengths["characters of the answer"][:3].tolist() == [8, 8, 8]
    assert examination.languages["de"] == 1
    assert examination.languages["en"] == 41
    assert examination.roles == {"user": 42, "assistant": 42}
    same = finding(examination, "the same as another")
    assert same is not None
    assert same.examples[0].place == "test 1"


class Tags(HTMLParser):
    """Refuses tags that are not closed, and what would be fetched from elsewhere."""

    VOID = {"meta", "line", "rect", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & dict(attrs).keys()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_no_markup_of_the_rows(tmp_path: Path) -> None:
    evil = talk("<script>alert(1)</script> & so on and on", "<script>alert(1)</script> & so on and on \u2028")
    text = page(found(tmp_path, [*PLAIN, evil, evil]))
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_a_histogram_counts_every_row() -> None:
    draw = np.random.default_rng(0)
    for values in (
        draw.integers(0, 9, 500), draw.integers(0, 900, 500), (10 ** draw.uniform(0, 6, 500)).astype(int),
        np.full(7, 3), np.array([0, 10**7]),
    ):  # fmt: skip
        told = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) rows", histogram(values, "t"))]
        assert sum(told) == len(values) or len(set(values.tolist())) == 1


def test_the_verb_reads_files_and_datasets(tmp_path: Path) -> None:
    def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from luthier.cli.main import main; main()", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    rows = [*PLAIN, talk("Who?", "Write to ann.lee@post.no.")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = luthier("data", "report", "rows.jsonl", "--html", "out/rows.html")
    assert done.returncode == 0, done.stderr
    assert "rows with an e-mail address: 1 (2.4% of 41)" in done.stdout
    assert "train 41 (rows.jsonl:41)" in done.stdout
    assert "<svg" in (tmp_path / "out" / "rows.html").read_text()
    told = json.loads(luthier("data", "report", "do/data", "--json").stdout)
    assert told["rows"] == {"train": 41}
    assert told["findings"][0]["examples"][0]["place"] == "train 41 (rows.jsonl:41)"
    (tmp_path / "bad.jsonl").write_text("{\n")
    bad = luthier("data", "report", "bad.jsonl")
    assert bad.returncode == 2
    assert "bad.jsonl:1" in bad.stderr
    gone = luthier("data", "report", "gone.jsonl")
    assert gone.returncode == 1
    assert "gone.jsonl: there is no such file, and no artifact is called so" in gone.stderr
