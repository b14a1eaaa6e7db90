"""The stage ``data``: files of every kind, what becomes of each row, and what is said of files that are wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_plugins import OnePlugin
from luthier.api import Artifact, Augmenter, Config, DataError, Row
from luthier.artifacts.columns import arrow_schema, columns_of, from_arrow, json_columns, optional_in, to_arrow
from luthier.artifacts.datasets import SPLITS, read_split
from luthier.artifacts.rows import checked, id_of, schema_of
from luthier.data.spool import Spool
from luthier.registry import Provider, Registry
from luthier.testing import run_stage

ROWS = [{"prompt": f'ask, "{n}"\nand wait', "completion": f"Ärger {n}"} for n in range(5)]


def read(folder: Path, content: bytes | Sequence[Any], name: str = "rows.jsonl", **config: Any) -> Artifact:
    source = folder / name
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    source.write_bytes(content)
    return run_stage(folder / "s", "data", {"source": str(source), **config})


def rows_of(data: Artifact) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in read_split(data, split)]


# -- files -----------------------------------------------------------------------------------------


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_arrow(new: Callable[..., Any]) -> bytes:
    table, out = arrow.Table.from_pylist(ROWS), arrow.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


def as_parquet() -> bytes:
    out = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(ROWS), out)
    return out.getvalue().to_pybytes()


FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": as_lines,
    "rows.ndjson": as_lines,
    "lines.json": as_lines,
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": lambda: json.dumps(ROWS).encode(),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + as_lines(),
    "crlf.jsonl": lambda: as_lines().replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda: b"\n" + as_lines().replace(b"\n", b"\n\n  \n"),
    "rows.jsonl.gz": lambda: gzip.compress(as_lines()),
    "rows.jsonl.zst": lambda: arrow.compress(as_lines(), codec="zstd", asbytes=True),
    "rows.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv": lambda: as_csv(","),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(","),
    "rows.csv.gz": lambda: gzip.compress(as_csv(",")),
    "rows.tsv": lambda: as_csv("\t"),
    "rows.parquet": as_parquet,
    "rows.arrow": lambda: as_arrow(ipc.new_file),
    "stream.arrow": lambda: as_arrow(ipc.new_stream),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    data = read(tmp_path, FILES[name](), name)
    assert data.facts["format"] == "prompt_completion"
    assert data.facts["read"] == data.facts["rows"]["train"] == len(ROWS)
    for raw, row in zip(ROWS, rows_of(data), strict=True):
        assert row["messages"] == [
            {"role": "user", "content": raw["prompt"]},
            {"role": "assistant", "content": raw["completion"]},
        ]
        assert row["source"].startswith(f"{name}:")
        assert row["id"] == id_of(row)
    assert len({row["id"] for row in rows_of(data)}) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "places"),
    [("rows.jsonl", [1, 2, 3, 4, 5]), ("rows.json", [2, 6, 10, 14, 18]), ("rows.csv", [2, 4, 6, 8, 10])],
)
def test_rows_say_the_line_that_they_begin_in(tmp_path: Path, name: str, places: list[int]) -> None:
    data = read(tmp_path, FILES[name](), name)
    assert [row["source"] for row in rows_of(data)] == [f"{name}:{place}" for place in places]


def test_paragraphs_of_texts_and_whole_markdown_files(tmp_path: Path) -> None:
    text = read(tmp_path, b"one\ntwo\n\n\n  \nthree\r\n\r\nfour", "a.txt")
    assert [(row["text"].split(), row["source"]) for row in rows_of(text)] == [
        (["one", "two"], "a.txt:1"),
        (["three"], "a.txt:6"),
        (["four"], "a.txt:8"),
    ]
    page = read(tmp_path, b"# Title\n\nA text.\n", "b.md")
    assert [row["text"] for row in rows_of(page)] == ["# Title\n\nA text.\n"]


def test_folders_patterns_and_lists_of_files(tmp_path: Path) -> None:
    for place, row in zip(("a/x.jsonl", "a/b/y.jsonl", "c/z.jsonl"), ROWS, strict=False):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    (tmp_path / "a/notes.doc").write_text("no rows")

    def sources(*places: str) -> list[str]:
        made = run_stage(tmp_path / "s", "data", {"source": [str(tmp_path / place) for place in places]})
        assert any("notes.doc" in text for text in made.manifest["warnings"]) == ("a" in places)
        return [row["source"] for row in rows_of(made)]

    assert sources("a") == ["b/y.jsonl:1", "x.jsonl:1"]
    assert sources("a/*.jsonl") == ["x.jsonl:1"]
    assert sources("*/*.jsonl") == ["a/x.jsonl:1", "c/z.jsonl:1"]
    assert sources("**/*.jsonl") == ["a/b/y.jsonl:1", "a/x.jsonl:1", "c/z.jsonl:1"]
    assert sources("c/z.jsonl", "a/*.jsonl") == ["z.jsonl:1", "x.jsonl:1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("rows.jsonl", "rows.csv"), "files of several kinds: .csv, .jsonl"),
        (("train.jsonl", "test.jsonl"), "files of several splits"),
        (("notes.doc",), "is no data file"),
        ((), "there are no files"),
    ],
)
def test_a_folder_that_is_not_one_set_of_rows_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_bytes(FILES.get(name, as_lines)())
    with pytest.raises(DataError, match=message):
        run_stage(tmp_path / "s", "data", {"source": str(tmp_path / "d")})


def test_what_another_recipe_made_is_read_again_with_all_it_has(tmp_path: Path) -> None:
    row = {"messages": CALL, "tools": [{"name": "warm"}], "slice": {"deep": [1, None]}}
    first = read(tmp_path, [row] * 2 + [{**row, "slice": 3}], keep=["slice"], split="train")
    again = run_stage(tmp_path / "t", "data", {"source": str(first.path / "train.parquet"), "keep": ["slice"]})
    for one, other in zip(rows_of(first), rows_of(again), strict=True):
        assert {key: one[key] for key in ("messages", "tools", "slice", "id")} == {
            key: other[key] for key in ("messages", "tools", "slice", "id")
        }


# -- bad files and bad rows ------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "a\xff"}', r"rows.jsonl:2: is not valid JSON \(not UTF-8 text, at byte 12\)"),
        (b'{"text": "\\ud800"}', r"rows.jsonl:2: .*lone surrogate"),
        (b'{"text": "a", "text": "b"}', r"rows.jsonl:2: .*'text' occurs twice"),
        (b'{"text": "a", "n": NaN}', r"rows.jsonl:2: .*NaN is no number"),
        (b'{"text": "a", "n": -Infinity}', r"rows.jsonl:2: .*-Infinity is no number"),
        (b'{"text": "a", "n": 123456789012345678901}', r"rows.jsonl:2: .*more than 64 bits"),
        (b'{"text": "a\\u0000b"}', r"rows.jsonl:2: .*null character"),
        (b'{"text": "a\x00b"}', r"rows.jsonl:2: is not valid JSON"),
        (b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", r"rows.jsonl:2: .*nested more than 100 levels"),
        (b'{"text": "' + b"a" * 50_000_000 + b'"}', r"rows.jsonl:2: is longer than 16 MB"),
        (b'{"text": "cut', r"rows.jsonl:2: is not valid JSON"),
        (b'["text"]', r"rows.jsonl:2: is not a JSON object"),
        (b'{"text": 3}', r"rows.jsonl:2: is no row of the format 'text': its keys are text"),
        (b'{"prompt": "a", "completion": "b"}', r"rows.jsonl:2: is no row of the format 'text'.* completion, prompt"),
        (b'{"text": "  "}', r"rows.jsonl:2: has no text under 'text'"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_can_be_left_out(tmp_path: Path, row: bytes, message: str) -> None:
    content = GOOD + row + b"\n" + GOOD
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)
    data = read(tmp_path, content, bad_rows={"drop_up_to": 0.34})
    assert data.facts["read"] == 3
    assert data.facts["rows"] == {"train": 2}
    assert sum(data.facts["dropped"].values()) == 1
    assert data.facts["ledger"][0] == ["rows were read", 3]
    assert sum(count for _, count in data.facts["ledger"]) == 2
    assert [row["source"] for row in rows_of(data)] == ["rows.jsonl:1", "rows.jsonl:3"]
    with pytest.raises(DataError, match=r"drop_up_to: 0\.334"):
        read(tmp_path, content, bad_rows={"drop_up_to": 0.33})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl.gz", gzip.compress(GOOD * 9999)[:-20], "is cut off"),
        ("rows.jsonl.gz", GOOD, "cannot be read"),
        ("rows.jsonl.zst", arrow.compress(GOOD * 9999, codec="zstd", asbytes=True)[:-4], "is cut off"),
        ("rows.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16 text"),
        ("rows.json", b'[{"text": "fine"}, {"text": ', r"rows.json:1: is not valid JSON"),
        ("rows.json", b'[{"text": "fine"}, 7]', r"rows.json:1: is not a JSON object"),
        ("rows.csv", b"text,text\na,b\n", "has 2 columns 'text'"),
        ("rows.csv", b"text,id\na,b\nc\n", r"rows.csv:3: has 1 cells, the header has 2"),
        ("rows.csv", b'text\n"a\n', "is no table"),
        ("rows.csv", b"text\na\xff\n", "rows.csv:2: is not UTF-8"),
        ("rows.parquet", as_parquet()[:-30], "cannot be read"),
        ("rows.arrow", as_lines(), "cannot be read"),
        ("rows.txt", b"fine\n\na\xffb\n", r"rows.txt:3: is not UTF-8"),
        ("rows.md", b"a\x00b\n", r"rows.md:1: has a null character"),
        ("rows.doc", b"fine", "is no data file"),
        ("rows.jsonl", b"\n \n", "has no rows"),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, name)


def test_bad_rows_are_counted_by_reason_and_the_first_are_shown(tmp_path: Path) -> None:
    rows = [{"text": "fine"}, *[{"text": ""}] * 30, *[{"messages": [{"role": "x", "content": ""}] * n} for n in (1, 2)]]
    with pytest.raises(DataError) as refused:
        read(tmp_path, rows)
    text = str(refused.value)
    assert text.startswith("32 of 33 rows are bad:")
    assert text.count("rows.jsonl:") == 20
    assert "30 x has no text under 'text'" in text
    assert "2 x is no row of the format 'text': its keys are messages" in text


def test_keys_that_are_not_used_are_named_however_many(tmp_path: Path) -> None:
    data = read(tmp_path, [{"text": "a", **{f"key{n}": n for n in range(10_000)}}])
    (warning,) = data.manifest["warnings"]
    assert "and 9980 more" in warning
    assert len(warning) < 1000


def test_a_pipe_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    recipe = tmp_path / "pipe.yaml"
    recipe.write_text("luthier: 1\nname: pipe\nstages:\n  rows: {uses: data, source: pipe.jsonl}\n")
    subprocess.run(["mkfifo", str(tmp_path / "pipe.jsonl")], check=True)
    done = cli("run", str(recipe))
    assert done.returncode == 2
    assert "is neither a file nor a folder" in done.stderr


MEASURED = """
import resource, sys
from pathlib import Path
from luthier.data.raw import raw_rows
from luthier.api import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kinds = [type(row).__name__ for _, row in raw_rows(Path(sys.argv[1]))]
print(kinds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.md"])
def test_a_row_that_is_far_too_long_is_never_held(tmp_path: Path, name: str) -> None:
    start = {"rows.json": b'[{"text": "', "rows.jsonl": b'{"text": "'}.get(name, b"")
    with (tmp_path / name).open("wb") as file:
        file.write(start)
        for _ in range(300):
            file.write(b"a" * 1_000_000)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    kinds, megabytes = done.stdout.rsplit(" ", 1)
    assert kinds == "['DataError']"
    assert int(megabytes) < 150


# -- formats ---------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = [
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "warm", "arguments": {"at": ["Oslo", 2]}}, "id": "c1"}
        ],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    {"role": "assistant", "content": "3 degrees.", "reasoning": "The tool says so."},
]
TOLD = [
    {"from": "human", "value": "How warm is it?"},
    {"from": "function_call", "value": '{"name": "warm", "arguments": {"at": ["Oslo", 2]}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "3 degrees."},
]


def without(messages: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    found = [{key: value for key, value in item.items() if key not in keys} for item in messages]
    for item in found:
        item |= (
            {"tool_calls": [{k: v for k, v in call.items() if k != "id"} for call in item["tool_calls"]]}
            if ("tool_calls" in item and "id" in keys)
            else {}
        )
    return found


@pytest.mark.parametrize(
    ("form", "raw", "messages"),
    [
        ("messages", {"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ("messages", {"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {**ANSWER, "weight": 0}]},
            [USER, {**ANSWER, "train": False}],
        ),
        ("messages", {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
         [{"role": "system", "content": "s"}, USER, ANSWER]),
        ("messages", {"messages": [USER, {**ANSWER, "reasoning_content": "t"}]}, [USER, {**ANSWER, "reasoning": "t"}]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         [USER, ANSWER]),
        ("sharegpt", {"conversations": [USER, ANSWER], "system": "s"},
         [{"role": "system", "content": "s"}, USER, ANSWER]),
        ("sharegpt", {"conversations": TOLD}, without(CALL, "id", "tool_call_id", "reasoning")),
        ("alpaca", {"instruction": "q", "output": "a"}, [USER, ANSWER]),
        ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\n\nx"}, ANSWER]),
        (
            "alpaca",
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["o", "p"]]},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "o"},
             {"role": "assistant", "content": "p", "train": False}, USER, ANSWER],
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, [USER, ANSWER]),
        (
            "prompt_completion",
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "s"},
            [{"role": "system", "content": "s"}, USER, {**ANSWER, "train": False}, USER, ANSWER],
        ),
    ],
)  # fmt: skip
def test_conversations_in_every_spelling(tmp_path: Path, form: str, raw: dict[str, Any], messages: Any) -> None:
    data = read(tmp_path, [raw])
    assert (data.facts["format"], data.facts["schema"]) == (form, "messages")
    assert rows_of(data)[0]["messages"] == messages
    assert data.manifest["warnings"] == []


PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("form", "raw", "row"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ("preference", PAIR, PAIR),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, PAIR["rejected"][0]]}, PAIR),
        ("preference", {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, PAIR["rejected"][0]]}, PAIR),
        ("labelled", {"prompt": "q", "completion": "a", "label": True},
         {"prompt": [USER], "completion": [ANSWER], "label": True}),
        ("prompt", {"prompt": "q"}, {"prompt": [USER]}),
    ],
)  # fmt: skip
def test_other_schemas_in_every_spelling(tmp_path: Path, form: str, raw: dict[str, Any], row: dict[str, Any]) -> None:
    data = read(tmp_path, [raw])
    assert data.facts["format"] == form
    (found,) = rows_of(data)
    assert {key: found[key] for key in row} == row
    assert schema_of(found) == data.facts["schema"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ANSWER, {"role": "system", "content": "s"}, USER, ANSWER], "message 1 is of the system, which speaks first"),
        ([USER, USER, ANSWER], "messages 0 and 1 are both of the user"),
        ([USER, ANSWER, ANSWER], "messages 1 and 2 are both of the assistant"),
        ([USER, {"role": "tool", "content": "3"}, ANSWER], "message 1 is a tool's result, and no call waits for one"),
        ([*CALL[:2], USER, ANSWER], "message 2 follows tool calls of which 1 have no result"),
        ([*CALL[:2], {**CALL[2], "tool_call_id": "x"}, ANSWER], "the call 'x', which no message made"),
        ([{**USER, "tool_calls": CALL[1]["tool_calls"]}, ANSWER], "message 0 has tool calls, and is none of the"),
        (
            [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments of f in message 1",
        ),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}], "a tool call without the name"),
        ([USER, {**ANSWER, "reasoning": "t", "reasoning_content": "u"}], "two different texts of its thinking"),
        ([USER, {**ANSWER, "weight": 0.5}], "message 1 has 0.5 under 'weight'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], r"no text \(image_url\)"),
        ([{"role": "robot", "content": "x"}, ANSWER], "message 0 has the unknown role 'robot'"),
        ([USER, {"role": "assistant", "content": None}], "message 1 has no text under 'content'"),
        ([USER], "ends with a turn of the user"),
    ],
)
def test_conversations_that_make_no_sense_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        read(tmp_path, [{"messages": messages}])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the chosen and the rejected answer are the same"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "the chosen and the rejected answer are the same"),
        ({"chosen": "a", "rejected": "b"}, "its answers do not begin alike"),
        ({"instruction": "", "output": "a"}, "has no text under 'instruction'"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "turn 0 is from 'alien'"),
        ({"conversations": [{"from": "function_call", "value": "no"}]}, "turn 0 is a function call, and no JSON"),
    ],
)
def test_rows_that_say_too_little_are_refused(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [raw])


def test_keys_get_other_names_before_a_format_is_recognised(tmp_path: Path) -> None:
    raw = {"question": "q", "answer": "a", "text": "by hand"}
    data = read(tmp_path, [raw], columns={"question": "prompt", "answer": "completion", "text": "note"}, keep=["note"])
    (row,) = rows_of(data)
    assert row["messages"] == [USER, ANSWER]
    assert row["note"] == "by hand"
    with pytest.raises(DataError, match="has the key 'answer' already"):
        read(tmp_path, [raw], columns={"question": "answer"}, format="text")


def test_what_is_kept_may_be_anything_and_is_there_in_every_row(tmp_path: Path) -> None:
    values: list[Any] = ["text", 3, 2.5, True, [1, {"a": None}], {"x": {"y": []}}]
    data = read(tmp_path, [{"prompt": "q", "want": value} for value in values], keep=["want"])
    assert [row["want"] for row in rows_of(data)] == values
    texts = read(tmp_path, [{"prompt": "q", "want": "3"}], "texts.jsonl", keep=["want"])
    assert parquet.read_schema(texts.path / "train.parquet").field("want").metadata is None
    with pytest.raises(DataError, match="has nothing under 'want'"):
        read(tmp_path, [{"prompt": "q"}], "none.jsonl", keep=["want"])
    with pytest.raises(ValueError, match=r"rename the key with `columns: \{source"):
        read(tmp_path, [{"prompt": "q"}], "none.jsonl", keep=["source"])


def test_rows_may_have_ids_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 0}, {"text": "two", "id": "b"}]
    assert [row["id"] for row in rows_of(read(tmp_path, rows, keep=["id"]))] == ["0", "b"]
    with pytest.raises(DataError, match="has nothing under 'id'"):
        read(tmp_path, [*rows, {"text": "three"}], "lacks.jsonl", keep=["id"])
    assert [row["id"] for row in rows_of(read(tmp_path, rows, "other.jsonl"))] == [id_of(row) for row in rows]


def test_rows_of_one_group_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "author": f"a{n % 6}"} for n in range(60)]
    data = read(tmp_path, rows, keep=["author"], split={"test": 0.4, "group_by": "author"})
    train, test = ({row["author"] for row in read_split(data, name)} for name in ("train", "test"))
    assert train
    assert test
    assert not train & test
    with pytest.raises(DataError, match="has nothing under 'writer'"):
        read(tmp_path, rows, split={"test": 0.4, "group_by": "writer"})


def test_the_limit_counts_rows_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 3)
    data = run_stage(tmp_path / "s", "data", {"source": str(tmp_path / "*.jsonl"), "limit": 4})
    assert [row["source"] for row in rows_of(data)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    assert data.facts["files"] == {"a.jsonl": 3, "b.jsonl": 1}


# -- rows on disk ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries(
        {"name": TEXT, "arguments": st.dictionaries(TEXT, ANYTHING, max_size=2)})}), min_size=1, max_size=2,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT},
    optional={"tool_calls": CALLS, "reasoning": TEXT, "train": st.booleans(), "name": TEXT, "tool_call_id": TEXT},
)
ROW = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3)},
    optional={"tools": st.lists(ANYTHING, max_size=2), "weight": st.floats(0, 9), "id": TEXT, "source": TEXT,
              "kept": ANYTHING.filter(lambda value: value is not None), "said": TEXT},
)  # fmt: skip


@given(st.lists(ROW, min_size=1, max_size=4))
def test_rows_come_back_from_their_columns_as_they_were(rows: list[dict[str, Any]]) -> None:
    names = columns_of("messages", {name for row in rows for name in row})
    schema = arrow_schema(names, optional_in(rows), json_columns(rows))
    assert from_arrow(to_arrow(rows, schema)) == rows


def test_an_id_is_told_from_what_a_row_teaches_with_alone() -> None:
    row = checked("messages", {"messages": [USER, ANSWER]})
    assert id_of(row) == id_of({**row, "slice": "x", "source": "y", "weight": 2.0})
    assert id_of(row) != id_of({**row, "tools": [{"name": "f"}]})
    assert id_of(row) != id_of(checked("messages", {"messages": [USER, {**ANSWER, "train": False}]}))


# -- rows that repeat others -----------------------------------------------------------------------


def worded(number: int, change: str = "") -> dict[str, Any]:
    words = [f"w{number}x{place}" for place in range(60)]
    words[30] = change or words[30]
    return {"prompt": f"question {number} {change}", "completion": " ".join(words)}


def test_rows_that_are_the_same_are_left_out_and_shown(tmp_path: Path) -> None:
    rows = [worded(1), worded(2), {key: f" {value.upper()}\n" for key, value in worded(1).items()}, worded(1, "other")]
    data = read(tmp_path, rows, dedupe={})
    assert [row["source"] for row in rows_of(data)] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert data.facts["dropped"] == {"is the same as an earlier row": 1}
    assert data.facts["characters"] == sum(
        len(message["content"]) for row in rows_of(data) for message in row["messages"]
    )
    (pair,) = map(json.loads, (data.path / "duplicates.jsonl").read_text().splitlines())
    assert (pair["kept"]["source"], pair["left_out"]["source"], pair["similarity"]) == (
        "rows.jsonl:1",
        "rows.jsonl:3",
        1,
    )
    assert read(tmp_path, rows).facts["dropped"] == {}


def test_similar_rows_are_left_out_from_the_similarity_that_is_asked_for(tmp_path: Path) -> None:
    rows = [worded(1), worded(2), worded(1, "other")]
    data = read(tmp_path, rows, dedupe={"near": 0.7})
    assert data.facts["ledger"] == [["rows were read", 3], ["is similar to an earlier row (0.7 or more)", -1]]
    assert [row["source"] for row in rows_of(data)] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert data.facts["dropped"] == {"is similar to an earlier row (0.7 or more)": 1}
    (pair,) = map(json.loads, (data.path / "duplicates.jsonl").read_text().splitlines())
    assert 0.7 < pair["similarity"] < 0.9
    assert "other" in pair["left_out"]["text"]
    assert read(tmp_path, rows, dedupe={"near": 0.95}).facts["dropped"] == {}


def test_similar_rows_are_never_on_two_sides(tmp_path: Path) -> None:
    rows = [worded(number, change) for number in range(40) for change in ("", "other", "third")]
    sides = read(tmp_path, rows, split={"test": 0.3, "validation": 0.2, "near_duplicates": 0.7})

    def numbers(data: Artifact, name: Any) -> set[str]:
        return {row["messages"][1]["content"].split("x")[0] for row in read_split(data, name)}

    found = [numbers(sides, name) for name in SPLITS]
    assert all(found)
    assert sum(map(len, found)) == 40
    apart = read(tmp_path, rows, split={"test": 0.3, "validation": 0.2, "near_duplicates": False})
    assert sum(len(numbers(apart, name)) for name in SPLITS) > 40


def test_rows_that_are_nearly_all_alike_are_told_of(tmp_path: Path) -> None:
    rows = [worded(1, f"change{number}") for number in range(30)] + [worded(number) for number in range(2, 10)]
    data = read(tmp_path, rows, split={"test": 0.2, "near_duplicates": 0.7})
    assert any("30 of 38 rows are similar to each other" in text for text in data.manifest["warnings"])


def test_system_prompts_that_all_rows_share_make_no_duplicates(tmp_path: Path) -> None:
    system = {"role": "system", "content": " ".join(f"rule{n}" for n in range(300))}
    rows = [{"messages": [system, {"role": "user", "content": f"what is {n}?"}, ANSWER]} for n in range(20)]
    assert read(tmp_path, rows, dedupe={"near": 0.5}).facts["dropped"] == {}


def test_the_ledger_adds_up_through_stages(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(4)] + [{"prompt": "q"}]
    votes = read(tmp_path, pairs, format="unpaired", bad_rows={"drop_up_to": 0.2})
    assert votes.facts["ledger"] == [
        ["rows were read", 5],
        ["more were made of rows that hold several", 4],
        ["is no row of the format 'unpaired': its keys are prompt", -1],
    ]
    data = read(tmp_path, [{"text": f"text {n}"} for n in range(4)], "texts.jsonl")
    method = {"uses": "template", "templates": [{"text": "text {{ n }}"}], "slots": {"n": list(range(6))}, "count": 6}
    for keep, lost in ((True, []), (False, [["is of `data`, which is not kept", -4]])):
        more = run_stage(tmp_path / "s", "augment", {"method": method, "keep_original": keep}, inputs={"data": data})
        ledger = more.facts["ledger"]
        assert ledger[:2] == [["rows of `data`", 4], ["were made by 'template'", 6]]
        assert ledger[-1:] == (lost or [["repeats another row", -4]])
        assert sum(count for _, count in ledger) == more.facts["rows"]["train"] == 6


def test_a_column_that_comes_late_is_not_lost(tmp_path: Path) -> None:
    with Spool(tmp_path / "rows.parquet", "text") as spool:
        spool.write([{"text": "a", "own": 1}])
        spool.write([{"text": "b"}])
        with pytest.raises(DataError, match="gives the column 'late' to some rows only"):
            spool.write([{"text": "c", "late": 2}])


class EchoConfig(Config):
    """Nothing to choose."""


class Echo(Augmenter[EchoConfig]):
    """Says every row again, louder."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        for row in rows:
            yield {"text": f"{row['text']}!", "parents": [row["id"]]}


def test_rows_that_are_made_of_others_name_them(tmp_path: Path) -> None:
    registry = Registry.installed()
    registry.add(OnePlugin("augmenter", "echo", EchoConfig, Echo), Provider("t", "t", "1"))
    data = read(tmp_path, [{"text": "one"}, {"text": "two"}])
    more = run_stage(tmp_path / "s", "augment", {"method": "echo"}, inputs={"data": data}, registry=registry)
    first, second, louder, loudest = rows_of(more)
    assert [louder["parents"], loudest["parents"]] == [[first["id"]], [second["id"]]]
    assert louder["source"] == "echo"
    assert louder["id"] == id_of(louder)
    assert "parents" not in first
