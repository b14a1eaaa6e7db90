"""Augmenters: what they ask, what they make of answers, and what the stage tells of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_api import Reply, Server, chat_api, completion, error
from luthier.api import Artifact, DataError, ModelError, Row
from luthier.artifacts.datasets import read_split
from luthier.artifacts.rows import id_of
from luthier.testing import run_stage, tiny_dataset

QUESTIONS = ["How tall is Mount Kenya?", "What is a kite made of?", "Who wrote the oldest song?"]


def talk(question: str, answer: str = "No idea.", **more: Any) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


ROWS = [talk(question) for question in QUESTIONS]


def augmented(
    folder: Path,
    method: dict[str, Any],
    rows: Sequence[Row] = ROWS,
    test: Sequence[Row] = (),
    *,
    seed: int = 0,
    **config: Any,
) -> Artifact:
    data = tiny_dataset(folder / "data", rows, test=test)
    return run_stage(folder, "augment", {"method": method, **config}, inputs={"data": data}, seed=seed)


def train_of(data: Artifact) -> list[Row]:
    return read_split(data, "train")


def asks(server: Server, uses: str, **config: Any) -> dict[str, Any]:
    return {"uses": uses, "generator": {"uses": "openai", "url": server.url, "model": "m"}, **config}


# -- answers ---------------------------------------------------------------------------------------


def test_prompts_are_answered_and_rows_name_their_parents(tmp_path: Path) -> None:
    with chat_api(lambda request: f"About: {request['messages'][-1]['content']}") as server:
        method = asks(server, "answer", system="Be brief.")
        data = augmented(tmp_path, method, [{**ROWS[0], "slice": "easy"}], [talk("Held out?")], keep_original=False)
    assert [message["role"] for message in server.requests[0]["messages"]] == ["system", "user"]
    (row,) = train_of(data)
    assert row["messages"][-1]["content"] == f"About: {QUESTIONS[0]}"
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert (row["parents"], row["source"], row["slice"]) == ([id_of(ROWS[0])], "answer", "easy")
    assert data.facts["rows"] == {"train": 1, "test": 1}
    assert data.facts["new_wordings"] > 0


def test_the_best_of_several_and_pairs_are_told_by_a_judge(tmp_path: Path) -> None:
    """The teacher's answers are numbers; the judge likes long ones."""

    def answer(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        if "[assistant]" in text:
            return f"Mark: {min(10, len(text.rpartition('[assistant]')[2].split()))}"[6:]
        return "word " * (request["seed"] + 1)

    with chat_api(answer) as server:
        judge = {"generator": {"uses": "openai", "url": server.url, "model": "m"}, "rubric": "It is long."}
        method = asks(server, "answer", samples=3, temperature=1.0, choose="best", judge=judge)
        best = augmented(tmp_path / "best", method, keep_original=False)
        assert [row["messages"][-1]["content"] for row in train_of(best)] == ["word word word"] * 3
        method |= {"choose": "pairs"}
        pairs = augmented(tmp_path / "pairs", method, keep_original=False)
        assert pairs.facts["schema"] == "preference"
        assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in train_of(pairs)] == [
            ("word word word", "word")
        ] * 3
        with pytest.raises(DataError, match=r"3 of 3 rows could not be made:\n  3 x its answers are as good as"):
            augmented(tmp_path, {**method, "gap": 3}, keep_original=False, row_schema="preference")
        before = len(server.requests)
        with pytest.raises(DataError, match="cannot be in one split"):
            augmented(tmp_path / "new", method)
        with pytest.raises(DataError, match="makes rows of the schema preference here, not messages"):
            augmented(tmp_path / "new", method, row_schema="messages")
        # Before anything is asked.
        assert len(server.requests) == before
    assert any("It is long." in request["messages"][0]["content"] for request in server.requests)


def test_a_judge_that_talks_nonsense_is_an_error(tmp_path: Path) -> None:
    with chat_api(lambda request: "What a fine answer!") as server:
        judge = {"generator": {"uses": "openai", "url": server.url, "model": "m"}}
        with pytest.raises(DataError, match="none of 3 answers got a mark"):
            augmented(tmp_path, {"uses": "filter", "judge": judge, "at_least": 5})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (completion("half of", "length"), "the answer was cut off at `max_new_tokens`"),
        (completion("  \n "), "the answer was empty"),
        (completion(QUESTIONS[0].upper()), "the answer repeats the prompt"),
        (error(400, "no"), "the generator refused the request: no"),
        (completion("<think>Hm.</think> "), "the answer was empty"),
    ],
    ids=["cut", "empty", "echo", "refused", "thought"],
)
def test_no_row_is_made_of_a_bad_answer_and_it_is_counted(tmp_path: Path, bad: Reply, reason: str) -> None:
    def answer(request: dict[str, Any]) -> Reply | str:
        return bad if request["messages"][-1]["content"] == QUESTIONS[0] else "A fine answer."

    with chat_api(answer) as server:
        method = asks(server, "answer")
        with pytest.raises(DataError, match=rf"1 of 3 rows could not be made:\n  1 x {re.escape(reason)}") as caught:
            augmented(tmp_path, method)
        assert caught.value.hint is not None
        assert "answers are kept" in caught.value.hint
        data = augmented(tmp_path / "again", method, bad_rows={"drop_up_to": 0.4})
    assert data.facts["dropped"] == {reason: 1}
    ledger = dict(data.facts["ledger"])
    assert (ledger["rows of `data`"], ledger["were made by 'answer'"], ledger[reason]) == (3, 3, -1)
    assert data.facts["rows"]["train"] == 5


# -- other wordings --------------------------------------------------------------------------------


def test_users_say_it_in_other_words_and_the_answer_stays(tmp_path: Path) -> None:
    with chat_api(lambda request: f"Tell me: {request['messages'][-1]['content']} {request['seed']}") as server:
        method = asks(server, "paraphrase", count=2, instruction="Say it anew.")
        data = augmented(tmp_path, method, [{**ROWS[0], "source": "x"}], seed=5)
    assert {request["messages"][0]["content"] for request in server.requests} == {"Say it anew."}
    assert [row["messages"][0]["content"] for row in train_of(data)[1:]] == [
        f"Tell me: {QUESTIONS[0]} {seed}" for seed in (5, 6)
    ]
    assert {row["messages"][1]["content"] for row in train_of(data)} == {"No idea."}


def test_a_translation_that_comes_back_the_same_is_no_row(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> str:
        told, text = (message["content"] for message in request["messages"])
        if "into Dutch" in told:
            return f"NL {text}"
        return text.removeprefix("NL ") if "kite" in text else f"Back: {text}"

    with chat_api(answer) as server:
        method = asks(server, "back_translate", by_way_of=["Dutch"])
        data = augmented(tmp_path, method, keep_original=False, bad_rows={"drop_up_to": 0.5})
    assert [row["messages"][0]["content"] for row in train_of(data)] == [
        f"Back: NL {text}" for text in QUESTIONS if "kite" not in text
    ]
    assert data.facts["dropped"]["the new wording is the old one"] == 1


def test_a_wording_that_is_held_out_is_left_out(tmp_path: Path) -> None:
    with chat_api(lambda request: "Held  OUT?") as server:
        data = augmented(tmp_path, asks(server, "paraphrase"), ROWS[:1], [talk("Held out?", "Yes.")])
    assert data.facts["dropped"] == {"is held out": 1}


def test_rows_that_are_like_another_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    long = "Please tell me in a few simple words how tall the mountain with the name of Mount Kenya is, and how old"
    with chat_api(lambda request: f"{request['messages'][-1]['content']} today") as server:
        method = asks(server, "paraphrase")
        assert augmented(tmp_path / "1", method, [talk(long)]).facts["rows"]["train"] == 2
        data = augmented(tmp_path / "2", method, [talk(long)], similar=0.7)
    assert data.facts["rows"]["train"] == 1
    assert data.facts["dropped"] == {"is like another row": 1}


# -- new rows --------------------------------------------------------------------------------------


def written(request: dict[str, Any]) -> str:
    """A teacher that writes a row for each number, in a fence, and the first twice."""
    number = request["messages"][-1]["content"].rpartition("New row ")[2].strip(":")
    number = "0.1" if number == "0.2" else number
    words = " ".join(f"word{number}{place}" for place in range(8))
    return f"```json\n{json.dumps(talk(f'Say {words}', words))}\n```"


def test_rows_are_written_after_examples_and_those_alike_left_out(tmp_path: Path) -> None:
    with chat_api(written) as server:
        method = asks(server, "synthesize", instruction="Rows about mountains.", count=5, examples=2)
        data = augmented(tmp_path, method)
    new = [row for row in train_of(data) if row.get("source") == "synthesize"]
    assert len(new) == 5
    # The one that was written twice is no row that could not be made.
    assert data.facts["dropped"] == {}
    assert len(server.requests) == 6
    assert all("Rows about mountains." in request["messages"][0]["content"] for request in server.requests)
    known = {id_of(row) for row in ROWS} | {row["id"] for row in new}
    assert all(len(row["parents"]) == 2 and set(row["parents"]) <= known for row in new)
    assert all(sum(question in text for question in QUESTIONS) == 2 for text in server.texts[:5])


def test_a_teacher_that_writes_no_rows_ends_the_stage(tmp_path: Path) -> None:
    with chat_api(lambda request: "Sure! Here is a row.") as server:
        method = asks(server, "synthesize", instruction="Rows.", count=4)
        with pytest.raises(DataError, match=r"12 of 12 rows could not be made:\n  12 x the answer is no JSON object"):
            augmented(tmp_path, method)
    with chat_api(lambda request: '{"messages": []}') as server:
        method = asks(server, "synthesize", instruction="Rows.", count=1)
        with pytest.raises(DataError, match="3 of 3 rows could not be made"):
            augmented(tmp_path / "2", method)


def test_a_server_is_given_the_schema_of_rows(tmp_path: Path) -> None:
    with chat_api(written) as server:
        method = asks(server, "synthesize", instruction="Rows.", count=1, structured=True)
        augmented(tmp_path, method)
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["messages"]


# -- without a generator ---------------------------------------------------------------------------


def test_each_edit_does_what_it_says_to_the_user_alone(tmp_path: Path) -> None:
    off = {"typos": 0, "lower": 0, "upper": 0, "no_punctuation": 0}
    wanted = {
        "lower": "how tall is mount kenya?",
        "upper": "HOW TALL IS MOUNT KENYA?",
        "no_punctuation": "How tall is Mount Kenya",
    }
    for option, text in wanted.items():
        data = augmented(tmp_path / option, {"uses": "edits", **off, option: 1}, ROWS[:1], keep_original=False)
        assert [message["content"] for message in train_of(data)[0]["messages"]] == [text, "No idea."]
    rows = [talk("Add 1234567890 and 55 to this number", "No idea.")]
    data = augmented(tmp_path / "typos", {"uses": "edits", **off, "typos": 0.3, "count": 9}, rows, keep_original=False)
    texts = [row["messages"][0]["content"] for row in train_of(data)]
    assert len(set(texts)) > 5
    assert all("1234567890" in text and "55" in text for text in texts)
    again = augmented(tmp_path / "again", {"uses": "edits", **off, "typos": 0.3, "count": 9}, rows, keep_original=False)
    assert [row["messages"] for row in train_of(again)] == [row["messages"] for row in train_of(data)]


def test_a_filter_keeps_rows_as_they_are_and_counts_the_others(tmp_path: Path) -> None:
    rows = [{**row, "level": level, "source": f"a:{level}"} for level, row in enumerate(ROWS)]
    rule = {"uses": "filter", "rule": "'kite' not in prompt and row.level < 2 and answer | length > 3"}
    data = augmented(tmp_path, rule, rows, [talk("Held out?")])
    (row,) = train_of(data)
    assert row["messages"] == ROWS[0]["messages"]
    assert row["level"] == 0
    assert data.facts["rows"] == {"train": 1, "test": 1}
    assert data.facts["dropped"] == {"was left out by 'filter'": 2}
    with pytest.raises(DataError, match="the rule fails for row 1: 'dict object' has no attribute 'lvl'"):
        augmented(tmp_path, {"uses": "filter", "rule": "row.lvl > 2"}, rows)
    with pytest.raises(ValueError, match="is not an expression"):
        augmented(tmp_path, {"uses": "filter", "rule": "row.level <"}, rows)
    with pytest.raises(ValueError, match="one of them"):
        augmented(tmp_path, {"uses": "filter"}, rows)


def test_a_judge_filters(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> str:
        return "**9**" if "kite" in request["messages"][-1]["content"] else "3/10"

    with chat_api(answer) as server:
        judge = {"generator": {"uses": "openai", "url": server.url, "model": "m"}}
        data = augmented(tmp_path, {"uses": "filter", "judge": judge, "at_least": 5})
    assert [row["messages"][0]["content"] for row in train_of(data)] == [QUESTIONS[1]]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"uses": "answer", "samples": 2}, "at the temperature 0 all 2 answers are the same"),
        ({"uses": "answer", "samples": 2, "temperature": 1, "choose": "best"}, "needs a `judge` or a `reward`"),
        ({"uses": "paraphrase", "count": 2, "temperature": 0}, "all 2 wordings are the same"),
        ({"uses": "edits", "typos": 0, "lower": 0, "upper": 0, "no_punctuation": 0}, "no edit has a share above 0"),
        ({"uses": "filter", "rule": "true", "at_least": 1}, "`at_least` goes with"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    if method["uses"] in ("answer", "paraphrase"):
        method = {**method, "generator": {"uses": "openai"}}
    with pytest.raises(ValueError, match=message):
        augmented(tmp_path, method)


def test_a_stage_that_was_stopped_by_its_budget_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = [talk(f"Question {number}?") for number in range(12)]
    with chat_api(lambda request: "A fine answer.") as server:
        generator = {"uses": "openai", "url": server.url, "model": "m", "at_once": 1, "budget": {"tokens": 60}}
        with pytest.raises(ModelError, match="the budget is spent: 65 of 60 tokens"):
            augmented(tmp_path, {"uses": "answer", "generator": generator}, rows)
        paid = len(server.requests)
        data = augmented(tmp_path, {"uses": "answer", "generator": {**generator, "budget": None}}, rows)
    assert paid == 5
    assert len(server.requests) == 12
    assert data.facts["rows"]["train"] == 24


def test_slots_are_filled_from_files_and_from_columns(tmp_path: Path) -> None:
    (tmp_path / "verbs.txt").write_text("open\n\n  close \n")
    (tmp_path / "rooms.csv").write_text("name,floor\nhall,1\nattic,3\n")
    rows = [{**row, "level": number} for number, row in enumerate(ROWS)]
    method = {
        "uses": "template",
        "templates": [talk("{{ verb }} the {{ room.name }} on floor {{ room.floor }}", "{{ old }} / {{ level }}")],
        "slots": {
            "verb": {"file": str(tmp_path / "verbs.txt")},
            "room": {"file": str(tmp_path / "rooms.csv")},
            "old": {"column": "prompt"},
            "level": {"column": "level"},
        },
        "count": 12,
    }
    new = train_of(augmented(tmp_path, method, rows, keep_original=False))
    asked = {row["messages"][0]["content"] for row in new}
    assert asked == {
        f"{verb} the {room}" for verb in ("open", "close") for room in ("hall on floor 1", "attic on floor 3")
    }
    parents = {id_of(row): row for row in rows}
    for row in new:
        parent = parents[row["parents"][0]]
        assert row["messages"][1]["content"] == f"{QUESTIONS[parent['level']]} / {parent['level']}"
    (tmp_path / "none.txt").write_text("\n")
    for slot, message in (
        ({"column": "nothing"}, "nothing under 'nothing'"),
        ({"file": str(tmp_path / "none.txt")}, "holds nothing"),
    ):
        with pytest.raises(DataError, match=message):
            augmented(tmp_path, {**method, "slots": {**method["slots"], "old": slot}}, rows, keep_original=False)


def test_prompts_alone_are_answered(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    with chat_api(lambda request: "So.") as server:
        data = augmented(tmp_path, asks(server, "answer"), rows, keep_original=False)
    assert data.facts["schema"] == "messages"
    assert data.facts["rows"] == {"train": 3}


def test_some_bad_answers_of_several_are_no_failed_rows(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Reply | str:
        if "[assistant]" in request["messages"][-1]["content"]:
            return "7"
        return completion("cut", "length") if request["seed"] % 2 else f"whole {request['seed']}"

    with chat_api(answer) as server:
        judge = {"generator": {"uses": "openai", "url": server.url, "model": "m"}}
        method = asks(server, "answer", samples=4, temperature=1.0, choose="best", judge=judge)
        data = augmented(tmp_path, method, keep_original=False)
    assert data.facts["rows"] == {"train": 3}
    assert dict(data.facts["ledger"])["were made by 'answer'"] == 3


def test_a_judge_that_is_the_teacher_has_the_same_budget(tmp_path: Path) -> None:
    with chat_api(lambda request: "7" if "[assistant]" in request["messages"][-1]["content"] else "so") as server:
        generator = {"uses": "openai", "url": server.url, "model": "m", "at_once": 1, "budget": {"tokens": 80}}
        method = {"uses": "answer", "generator": generator, "judge": {"generator": generator},
                  "samples": 2, "temperature": 1.0, "choose": "best"}  # fmt: skip
        # Six answers are 66 tokens; of the three marks two more are paid for.
        with pytest.raises(ModelError, match="the budget is spent: 88 of 80 tokens"):
            augmented(tmp_path, method, keep_original=False)


def test_half_a_sign_makes_no_row_and_breaks_nothing(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> str:
        return "smile \ud83d" if "kite" in request["messages"][-1]["content"] else "fine"

    with chat_api(answer) as server:
        data = augmented(tmp_path, asks(server, "answer"), keep_original=False, bad_rows={"drop_up_to": 0.5})
        assert data.facts["dropped"]["the answer holds half a sign (a lone surrogate)"] == 1
    row = '{"messages": [{"role": "user", "content": "smile \\ud83d"}, {"role": "assistant", "content": "a"}]}'
    with chat_api(lambda request: row) as server:
        method = asks(server, "synthesize", instruction="Rows.", count=1)
        with pytest.raises(DataError, match="3 x the answer is no JSON object"):
            augmented(tmp_path / "2", method)


def test_rows_keep_what_is_theirs(tmp_path: Path) -> None:
    """Of rows that are the same a filter keeps the one that is meant; an edited row weighs as much as it did."""
    twice = [{**ROWS[0], "topic": "a", "weight": 0.5}, {**ROWS[0], "topic": "b", "weight": 0.1}]
    (kept,) = train_of(augmented(tmp_path / "f", {"uses": "filter", "rule": "row.topic == 'a'"}, twice))
    assert (kept["topic"], kept["weight"]) == ("a", 0.5)
    edits = {"uses": "edits", "lower": 1, "typos": 0, "no_punctuation": 0}
    data = augmented(tmp_path / "e", edits, twice[1:])
    assert [(row["messages"][0]["content"], row["weight"]) for row in train_of(data)] == [
        (QUESTIONS[0], 0.1),
        (QUESTIONS[0].lower(), 0.1),
    ]


def test_texts_are_filtered_and_not_edited(tmp_path: Path) -> None:
    rows: list[Row] = [{"text": "short"}, {"text": "a longer one"}]
    data = augmented(tmp_path, {"uses": "filter", "rule": "answer | length > 6"}, rows)
    assert [row["text"] for row in train_of(data)] == ["a longer one"]
    with pytest.raises(DataError, match="texts have no turns of a user to edit"):
        augmented(tmp_path, {"uses": "edits"}, rows)


def test_braces_in_a_file_are_no_template(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Say {{ name }}\n")
    method = {
        "uses": "template",
        "templates": [talk("{{ line }}", "ok")],
        "slots": {"line": {"file": str(tmp_path / "lines.txt")}},
        "count": 1,
    }
    data = augmented(tmp_path, method, keep_original=False)
    assert train_of(data)[0]["messages"][0]["content"] == "Say {{ name }}"
