"""Metrics against the libraries that define them, and on the answers that models give."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Completion, DataError, LuthierError, Sample, Score
from luthier.registry import default_registry
from luthier.testing import TestContext
from rouge_score import rouge_scorer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-test.jsonl"
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "away", "twice"]), min_size=1,
                 max_size=12).map(" ".join)  # fmt: skip
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8)


def sample(answer: str, reference: str = "yes", **more: Any) -> Sample:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reference}]
    return Sample({"messages": turns}, "?", reference, (Completion(answer, more.pop("tokens", 3), "stop"),), **more)


def score(name: str, *pairs: tuple[str, str], **config: Any) -> Score:
    metric = TestContext().build(default_registry().use("metric", {"uses": name, **config}))
    return metric.score([sample(said, right) for said, right in pairs], None)


@given(PAIRS)
def test_bleu_and_chrf_are_sacrebleu_s(pairs: list[tuple[str, str]]) -> None:
    said, right = [a for a, _ in pairs], [[b for _, b in pairs]]
    assert score("bleu", *pairs).value == sacrebleu.corpus_bleu(said, right).score
    assert score("chrf", *pairs).value == sacrebleu.corpus_chrf(said, right).score
    assert score("chrf", *pairs, word_order=2).value == sacrebleu.corpus_chrf(said, right, word_order=2).score
    rows = score("bleu", *pairs).by_row
    assert rows == [sacrebleu.sentence_bleu(a, [b]).score for a, b in pairs]


def test_bleu_of_several_rows_is_the_plain_corpus_bleu() -> None:
    pairs = [("the cat sat on the mat twice today", "the cat sat on a mat twice today"), ("it is so", "it is not so")]
    assert score("bleu", *pairs).value == pytest.approx(
        sacrebleu.corpus_bleu([a for a, _ in pairs], [[b for _, b in pairs]]).score
    )
    assert score("bleu", ("THE CAT SAT ON IT", "the cat sat on it"), lowercase=True).value == pytest.approx(100)
    assert score("bleu", ("THE CAT SAT ON IT", "the cat sat on it")).value < 1
    assert score("bleu", ("你好吗我很好", "你好吗我很好"), tokenize="zh").value == pytest.approx(100)


@given(PAIRS)
def test_rouge_is_rouge_score_s(pairs: list[tuple[str, str]]) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL", "rouge2"])
    for kind in ("rougeL", "rouge2"):
        rows = [scorer.score(right, said)[kind].fmeasure for said, right in pairs]
        found = score("rouge", *pairs, type=kind)
        assert found.by_row == rows
        assert found.value == pytest.approx(sum(rows) / len(rows))
    assert score("rouge", ("the cats ran", "the cat ran"), stemmer=True).value == 1


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        # By the definition of SQuAD's evaluation script: 2 common words of 3 and 4.
        ("big red dog", "the red dog ran off", 2 * 2 / (3 + 4)),
        ("The Cat.", "cat", 1.0),
        ("an", "the", 1.0),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 * 1 / 3),
    ],
)
def test_f1_counts_words_as_squad_does(said: str, right: str, value: float) -> None:
    assert score("f1", (said, right)).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        ("So it is 1,234.50 euros.", "#### 1234.5", 1),
        ("2 + 2 = 4\n#### 4", "#### 4", 1),
        ("#### 4\n\nQuestion: 7 and 8?", "#### 4", 1),
        ("It is -3", "#### -3", 1),
        ("It is 3", "#### -3", 0),
        ("10 - 3 is 7", "7", 1),
        ("It costs $.50", "#### 0.5", 1),
        ("####", "#### 4", None),
        ("none", "#### 4", None),
        ("12,5", "#### 5", 1),
        ("From 10-20", "20", 1),
        ("(3)-4", "4", 1),
        ("It is 1e5", "5", 0),
        ("It is 1e5", "100000", 1),
        ("x2", "2", None),
    ],
)
def test_the_number_of_an_answer(said: str, right: str, value: float | None) -> None:
    found = score("numeric", (said, right))
    assert (found.value, found.unread) == (value or 0, int(value is None))


def test_numeric_options_and_references_without_a_number() -> None:
    assert score("numeric", ("Answer: 4. Or 5?", "4"), mark="Answer:").value == 1
    assert score("numeric", ("#### 5 or 4", "4"), mark=None).value == 1
    assert score("numeric", ("99", "100"), tolerance=0.02).value == 1
    assert score("numeric", ("99", "100")).value == 0
    assert score("numeric", ("0", "0.02"), tolerance=0.05).value == 0
    assert score("numeric", ("0.0", "0")).value == 1
    with pytest.raises(DataError, match="no number in the reference 'yes'"):
        score("numeric", ("4", "yes"))


@pytest.mark.skipif(not GSM8K.exists(), reason="the real data set is not here")
def test_every_answer_of_gsm8k_is_right_about_itself() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    found = score("numeric", *((text, text) for text in answers))
    assert (found.value, found.unread) == (1.0, 0)
    # Against the answer to the next question hardly any is.
    assert score("numeric", *pairwise(answers)).value < 0.05


def test_exact_match_options() -> None:
    assert score("exact_match", (" Yes ", "yes")).value == 0
    assert score("exact_match", (" Yes ", "yes"), ignore_case=True).value == 1
    assert score("exact_match", ("yes ", "yes"), strip=False).value == 0
    assert score("exact_match", ("yes,  it is.", "yes it is"), ignore_punctuation=True).value == 1


def test_patterns_are_found_or_match_the_whole() -> None:
    assert score("regex", ("so 12", ""), ("none", ""), pattern=r"\d+").value == 0.5
    assert score("regex", ("so 12", ""), (" 12 ", ""), pattern=r"\d+", whole=True).by_row == [0, 1]
    with pytest.raises(ValueError, match="is not a regular expression"):
        score("regex", ("", ""), pattern="(")


def test_json_answers() -> None:
    good, fenced = '{"a": 1}', '```json\n{"a": 1}\n```'
    texts = [good, fenced, "[" * 100_000, "NaN", "", '{"a": 1} so']
    assert score("json_valid", *((text, "") for text in texts)).by_row == [1, 0, 0, 0, 0, 0]
    assert score("json_valid", (fenced, ""), fenced=True).value == 1
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    found = score("json_schema", (good, ""), ('{"a": "1"}', ""), ("no", ""), json_schema=schema)
    assert (found.by_row, found.unread) == ([1, 0, 0], 1)
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(good))
    with pytest.raises(LuthierError, match="is no JSON schema"):
        score("json_schema", (good, ""), json_schema={"type": "nothing"})


def test_lengths_and_repetition() -> None:
    assert score("length", ("a bc", "")).value == 4
    assert score("length", ("a bc", ""), of="words").value == 2
    assert score("length", ("a bc", ""), of="tokens").value == 3
    # Eight words have five runs of four, of which the last repeats the first.
    assert score("repetition", ("a b c d a b c d", "")).value == pytest.approx(1 / 5)
    assert score("repetition", ("a b c", "")).value == 0


def test_perplexity_per_byte_is_that_of_what_is_said() -> None:
    logps = (-1.0, -2.0, -0.5)
    metric = TestContext().build(default_registry().use("metric", {"uses": "perplexity", "per": "byte"}))
    found = metric.score([sample("", "né!", logps=logps)], None)
    assert found.value == pytest.approx(math.exp(3.5 / 4))
    assert found.weights == [4]
    assert found.of_mean is not None
    assert found.of_mean(found.by_row[0]) == pytest.approx(found.value)


def test_calls_and_thinking_have_bytes_too() -> None:
    call = {"type": "function", "function": {"name": "warm", "arguments": {}}}
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "reasoning": "So", "tool_calls": [call]},
    ]
    metric = TestContext().build(default_registry().use("metric", {"uses": "perplexity", "per": "byte"}))
    found = metric.score([Sample({"messages": turns}, "?", "", logps=(-0.1,) * 30)], None)
    assert found.weights == [2 + len(json.dumps(call["function"]))]
    assert found.value < 1.2


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(LuthierError, match="sacrebleu is not installed") as caught:
        score("bleu", ("a", "a"))
    assert caught.value.hint == "pip install 'luthier[evaluation]', or sacrebleu"
