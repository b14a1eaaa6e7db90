"""What is odd about a dataset, row by row and between rows: found in one pass, told with the rows and what to do."""

from __future__ import annotations

import ast
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from luthier.api.artifact import Artifact
from luthier.api.data import SOURCE, Message, Row
from luthier.artifacts.datasets import SPLITS, Split, iter_rows
from luthier.artifacts.digest import digest_value
from luthier.artifacts.rows import asked_by, compared_text, content_of, conversations, prompt_of
from luthier.data.similar import Similar

BATCH = 1000
EXAMPLES = 5
"""Rows that a finding shows."""
SHOWN = 240
"""Characters of each."""
LANGUAGES = 2000
"""Rows whose language is told, spread over the data: a guess takes half a millisecond."""
GUESSED = 40
"""Characters that a text needs, for its language to be told."""
NEAR = 0.8
"""The similarity of rows that are nearly the same."""
FEW, RARE = 0.2, 0.002
"""A habit that a share of answers between these have, or lack, is an inconsistency."""
BIAS = 0.7
"""The share of pairs whose chosen answer is the longer one, from which on length may be what is learned."""
REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry, (but )?i|i apologi[sz]e|i can(no|')t|i('?m| am) (not able|unable)"
    r"|unfortunately, i (can|am)|as an? (ai|artificial|large language|language model))\b",
    re.IGNORECASE,
)
PERSONAL = {
    "an e-mail address": re.compile(r"\b[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"),
    "a phone number": re.compile(
        r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}|\(\d{3}\) ?\d{3}-\d{4})(?!\w)"
    ),
    "a key": re.compile(
        r"\b(?:sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{36,}|hf_[A-Za-z]{30,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35})"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
}  # fmt: skip
FENCE = re.compile(r"^```([\w+-]*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
HABITS: dict[str, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "end with a punctuation mark": (re.compile(r"[.!?:;)\]}\"'`*]\s*$"), re.compile(r"\w\s*$")),
    "begin with a capital letter": (re.compile(r"^\W*[A-Z\u00c0-\u00de]"), re.compile(r"^\W*[a-z\u00df-\u00ff]")),
    "have Markdown": (re.compile(r"^(#{1,6} |[-*] |\d+\. |```)|\*\*\S", re.MULTILINE), re.compile("")),
    "have white space at an end": (re.compile(r"^\s|\s$"), re.compile("")),
}
"""What answers of one style either do or do not: a pattern of those that do, and of those that do not; others, such as
one that begins with a number, are neither."""


@dataclass(slots=True)
class Example:
    """A row that a finding is about.

    Attributes:
        place: Its split and number, from 1; and the file and line that it is from.
        text: What is odd about it.
    """

    place: str
    text: str


@dataclass(slots=True)
class Finding:
    """Something that is odd.

    Attributes:
        name: What it is.
        advice: What to do about it.
        count: The rows that it is about.
        of: The rows that were looked at.
        examples: The first of them.
    """

    name: str
    advice: str
    count: int = 0
    of: int = 0
    examples: list[Example] = field(default_factory=list[Example])

    def add(self, place: str, text: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Example(place, _short(text)))


@dataclass(slots=True)
class Examination:
    """What a dataset is like.

    Attributes:
        name: The stage that made it.
        schema: The schema of its rows.
        rows: How many each split has.
        lengths: Characters of each row's prompt and answer, turns; of pairs both answers.
        languages: How many of the rows whose language was told have each.
        roles: How many turns each role has.
        findings: What is odd, the most frequent first.
        ledger: What became of the rows that came.
    """

    name: str
    schema: str
    rows: dict[str, int]
    lengths: dict[str, np.ndarray]
    languages: Counter[str]
    roles: Counter[str]
    findings: list[Finding]
    ledger: list[tuple[str, int]]


def examine(dataset: Artifact, progress: Callable[[int, int], None] = lambda done, total: None) -> Examination:
    """Look at every row of a dataset.

    Args:
        dataset: The dataset.
        progress: Hears how many rows were looked at, of how many.
    """
    total = sum(dataset.facts["rows"].values())
    eye = _Eye(total)
    with tempfile.TemporaryDirectory() as folder, Similar(Path(folder) / "shingles", NEAR) as similar:
        for split in SPLITS:
            number = 0
            for rows in iter_rows(dataset, split, BATCH):
                similar.add([compared_text(row) for row in rows])
                for row in rows:
                    number += 1
                    eye.look(split, number, row)
                progress(eye.seen, total)
        tied = similar.tied()
    eye.near(tied)
    return Examination(
        dataset.manifest["stage"],
        dataset.facts["schema"],
        dict(dataset.facts["rows"]),
        {name: np.asarray(values) for name, values in eye.lengths.items() if values},
        eye.languages,
        eye.roles,
        sorted(eye.findings(), key=lambda found: -found.count),
        [(what, count) for what, count in dataset.facts.get("ledger") or []],
    )


class _Eye:
    """Looks at one row after the other."""

    def __init__(self, total: int) -> None:
        self.seen = 0
        self.lengths: dict[str, list[int]] = {
            "characters of the prompt": [],
            "characters of the answer": [],
            "turns": [],
            "characters of the chosen answer": [],
            "characters of the rejected answer": [],
        }
        self.languages: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self._every = max(1, total // LANGUAGES)
        self._found: dict[str, Finding] = {}
        self._looked: Counter[str] = Counter()
        self._places: list[str] = []
        self._texts: list[str] = []
        self._contents: dict[str, int] = {}
        self._answers: dict[str, tuple[str, int]] = {}
        self._repeats: set[int] = set()
        self._habits = {
            name: (Finding(f"answers that {name}", ""), Finding(f"answers that do not {name}", "")) for name in HABITS
        }
        self._longer = self._shorter = 0

    def findings(self) -> Iterator[Finding]:
        """All that is odd."""
        for finding in self._found.values():
            finding.of = self._looked[finding.name] or self.seen
            yield finding
        for name, (those, others) in self._habits.items():
            few = min(those, others, key=lambda finding: finding.count)
            whole = those.count + others.count
            if max(1, RARE * whole) <= few.count <= FEW * whole:
                few.of = whole
                few.advice = (
                    f"most answers {'do not' if few is those else 'do'}: the model learns both; make them alike"
                )
                if name == "have white space at an end":
                    few.advice = "the model learns to write it: strip it"
                yield few
        pairs = self._longer + self._shorter
        share = self._longer / pairs if pairs else 0.5
        if pairs and not 1 - BIAS < share < BIAS:
            word = "longer" if share >= BIAS else "shorter"
            yield Finding(
                f"pairs whose chosen answer is the {word} one",
                "length alone tells them apart: balance them, or use an objective that counts per token",
                self._longer if word == "longer" else self._shorter,
                pairs,
            )

    def look(self, split: Split, number: int, row: Row) -> None:
        """Look at a row."""
        source = f" ({row[SOURCE]})" if row.get(SOURCE) else ""
        place = f"{split} {number}{source}"
        self._places.append(place)
        text = compared_text(row)
        self._texts.append(_short(text))
        if self.seen % self._every == 0 and len(text) >= GUESSED:
            self.languages[_language(text)] += 1
        self.seen += 1
        self._same(place, row)
        self._personal(place, text)
        self._code(place, row)
        talks = conversations(row)
        prompt = prompt_of(row)
        if prompt:
            self.lengths["characters of the prompt"].append(sum(len(message["content"]) for message in prompt))
        for message in talks[0] if talks else prompt:
            self.roles[message["role"]] += 1
        if "text" in row:
            self.lengths["characters of the answer"].append(len(text))
        if not talks:
            return
        self.lengths["turns"].append(len(talks[0]))
        if "chosen" in row:
            chosen, rejected = (len(talk[-1]["content"]) for talk in talks)
            self.lengths["characters of the chosen answer"].append(chosen)
            self.lengths["characters of the rejected answer"].append(rejected)
            self._longer += chosen > rejected
            self._shorter += chosen < rejected
        else:
            self.lengths["characters of the answer"].append(len(talks[0][-1]["content"]))
            self._contradicts(place, row, talks[0][-1]["content"])
        good = row.get("label", True)
        if good:
            self._answer(place, prompt, talks[0][-1])

    def near(self, tied: np.ndarray) -> None:
        """Take down which rows are like an earlier one, but for those that are the same."""
        for place, first in enumerate(tied.tolist()):
            if first != place and place not in self._repeats:
                self._add(
                    "rows that are nearly the same as another",
                    self._places[place],
                    f"{self._texts[place]}  ~  {self._places[first]}: {self._texts[first]}",
                    "they weigh more than others: `dedupe: {near: 0.8}` in the data stage leaves them out",
                )

    def _same(self, place: str, row: Row) -> None:
        key = digest_value(content_of(row))[:20]
        first = self._contents.setdefault(key, self.seen - 1)
        if first != self.seen - 1:
            self._repeats.add(self.seen - 1)
            self._add(
                "rows that are the same as another",
                place,
                f"{self._texts[-1]}  =  {self._places[first]}",
                "they weigh more than others: `dedupe: {}` in the data stage leaves them out",
            )

    def _contradicts(self, place: str, row: Row, answer: str) -> None:
        prompt = digest_value(asked_by(row))[:20]
        said = " ".join(answer.split()).casefold()
        before = self._answers.setdefault(prompt, (digest_value(said)[:20], self.seen - 1))
        if before[0] != digest_value(said)[:20]:
            self._add(
                "rows that answer a prompt in another way than an earlier one",
                place,
                f"{self._texts[-1]}  !  {self._places[before[1]]}: {self._texts[before[1]]}",
                "if only one can be right, keep that; a model that is trained on both says either",
            )

    def _answer(self, place: str, prompt: Sequence[Message], message: Message) -> None:
        answer = message["content"]
        if not answer.strip():
            if not message.get("tool_calls"):
                self._add("answers that are empty", place, self._texts[-1], "leave these rows out")
            return
        for name, (does, does_not) in HABITS.items():
            if does.search(answer):
                self._habits[name][0].add(place, answer)
            elif does_not.search(answer):
                self._habits[name][1].add(place, answer)
        if REFUSAL.match(answer):
            self._add(
                "answers that refuse",
                place,
                answer,
                "are they meant? refusals of harmless requests are learned quickly; a `filter` takes them out",
            )
        asked = " ".join(prompt[-1]["content"].split()) if prompt else ""
        if len(asked.split()) > 3 and " ".join(answer.split()).startswith(asked):
            self._add(
                "answers that repeat the prompt",
                place,
                answer,
                "the model learns to repeat: cut the prompt off the answers",
            )

    def _personal(self, place: str, text: str) -> None:
        for name, pattern in PERSONAL.items():
            found = pattern.search(text)
            if found is not None:
                self._add(
                    f"rows with {name}",
                    place,
                    _masked(found[0]),
                    "a model can be made to say what it was trained on: replace them by made-up ones",
                )

    def _code(self, place: str, row: Row) -> None:
        talks = conversations(row)
        texts = [talks[0][-1]["content"]] if talks else [row["text"]] if "text" in row else []
        for text in texts:
            if "```" not in text:
                continue
            self._looked["answers with code that does not parse"] += 1
            problem = _broken(text)
            if problem:
                self._add(
                    "answers with code that does not parse",
                    place,
                    problem,
                    "the model learns to write such code: mend it, or leave the rows out",
                )

    def _add(self, name: str, place: str, text: str, advice: str) -> None:
        self._found.setdefault(name, Finding(name, advice)).add(place, text)


def _broken(text: str) -> str:
    """What is wrong with the first block of code that does not parse."""
    for language, code in FENCE.findall(text):
        try:
            if language in ("python", "py", "python3"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ast.parse(code)
            elif language == "json":
                json.loads(code)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            return f"{language}: {error}"
    return "a block of code that does not end" if len(re.findall(r"^```", text, re.MULTILINE)) % 2 else ""


@cache
def _guesser() -> Any:
    # Takes a second, and is not needed for planning.
    return import_module("py3langid")


def _language(text: str) -> str:
    return str(_guesser().classify(text[:1000])[0])


def _masked(text: str) -> str:
    """A secret, so that it can be found and not read."""
    return f"{text[:3]}...{text[-2:]}" if len(text) > 8 else "..."


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def plain(found: Examination) -> Mapping[str, Any]:
    """An examination as plain values, for machines."""
    return {
        "name": found.name,
        "schema": found.schema,
        "rows": found.rows,
        "lengths": {
            name: {
                "median": float(np.median(values)),
                "mean": float(values.mean()),
                "longest": int(values.max()),
            }
            for name, values in found.lengths.items()
        },
        "languages": dict(found.languages.most_common()),
        "roles": dict(found.roles.most_common()),
        "findings": [
            {
                "name": item.name,
                "count": item.count,
                "of": item.of,
                "advice": item.advice,
                "examples": [{"place": example.place, "text": example.text} for example in item.examples],
            }
            for item in found.findings
        ],
    }
