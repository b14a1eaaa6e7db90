"""Tokens on disk: made once, in parallel, and kept as a memory-mapped Arrow file for all that would make the same."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from luthier.api.artifact import Artifact
from luthier.api.context import Context
from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.artifacts.datasets import Split, iter_rows
from luthier.artifacts.digest import digest_value
from luthier.artifacts.rows import texts_of
from luthier.artifacts.store import UNFINISHED
from luthier.artifacts.texts import TOKENIZER_FILES
from luthier.modeling.chat import Answers, ChatEncoder
from luthier.modeling.loading import load_tokenizer
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow, block_of, encode_row

REVISION = 1
"""Of how rows become tokens: raised when the same rows become others, so that files made before are not used."""
CHUNK = 512
"""Rows that are made tokens of at a time."""
AT_LEAST = 4000
"""Rows for which starting more processes pays: each loads transformers and the tokenizer for some seconds."""
KEPT_PAGES = 2048
"""Rows after whose reading the pages of a mapped file are given back."""
EXAMPLES = 20
"""Rows that cannot be used which are kept with their reason, for an error to name."""
QUOTED = 60
"""Characters of a row that are quoted to find it by."""
TOKENS, FACTS = "tokens.arrow", "facts.json"


@dataclass(frozen=True, slots=True)
class Labelling:
    """How rows become tokens and labels.

    Attributes:
        source: A model or an adapter, for its tokenizer.
        stop_ids: The tokens on which its generation stops.
        date: What a chat template is told that asks for the day, in ISO form.
        of: Whether answers are trained behind their prompts, or whole documents.
        answers: Which answers of a conversation are trained.
    """

    source: Path
    stop_ids: tuple[int, ...]
    date: str | None
    of: Literal["answers", "documents"]
    answers: Answers = "all"

    def encoder(self) -> ChatEncoder:
        """What makes tokens of rows so."""
        import datetime

        date = None if self.date is None else datetime.date.fromisoformat(self.date)
        return ChatEncoder(load_tokenizer(Artifact.load(self.source)), self.stop_ids, date)

    def encode(self, encoder: ChatEncoder, row: Row) -> EncodedRow:
        """One row.

        Raises:
            DataError: it cannot be trained on.
        """
        return block_of(encoder.document(row)) if self.of == "documents" else encode_row(encoder, row, self.answers)

    def key(self, dataset: Artifact, split: Split) -> str:
        """Identifies the tokens of a split: same key, same tokens."""
        source = Artifact.load(self.source)
        files: Mapping[str, Any] = source.manifest["files"]
        tokenizer = {name: value for name, value in files.items() if name in TOKENIZER_FILES or name.endswith(".jinja")}
        return digest_value(
            {
                "tokens": REVISION,
                "rows": dataset.manifest["files"].get(f"{split}.parquet"),
                "tokenizer": tokenizer,
                "architecture": source.facts.get("architecture"),
                "labelling": [list(self.stop_ids), self.date, self.of, self.answers],
                "libraries": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
            }
        )


@dataclass(slots=True)
class BadRows:
    """Rows that no tokens could be made of.

    Attributes:
        reasons: How many, by reason.
        examples: The first: number, how it begins, reason, hint.
    """

    reasons: Counter[str] = field(default_factory=Counter[str])
    examples: list[tuple[int, str, str, str | None]] = field(default_factory=list[tuple[int, str, str, "str | None"]])

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.reasons.values())

    def add(self, other: BadRows) -> None:
        """Those of the rows behind these."""
        self.reasons.update(other.reasons)
        self.examples = [*self.examples, *other.examples][:EXAMPLES]


@dataclass(slots=True)
class _Chunk:
    """Tokens of some rows, one entry a completion; lists of lists as values and the ends of each list."""

    rows: np.ndarray
    ids: np.ndarray
    id_ends: np.ndarray
    spans: np.ndarray
    span_ends: np.ndarray
    marks: np.ndarray
    weights: np.ndarray
    bad: BadRows
    notes: Counter[str]


class TokenFile(Sequence[EncodedRow]):
    """The rows of a split as tokens, read from disk as they are asked for.

    Attributes:
        rows: How many rows the split has, those included that no tokens could be made of.
        bad: The latter.
        notes: In how many rows something was found that is trained on all the same, by what it is.
        numbers: Which row of the split each is, from 0, shape (rows with tokens,).
        lengths: The tokens of each row's longest completion, of the same shape.
        targets: How many tokens of each row are trained, of the same shape.
        tokens_of: The tokens of each row, of all its completions, of the same shape.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.rows: int = facts["rows"]
        self.bad = BadRows(Counter(facts["bad"]), [tuple(item) for item in facts["examples"]])
        self.notes: Counter[str] = Counter(facts["notes"])
        arrow: Any = import_module("pyarrow")
        ipc: Any = import_module("pyarrow.ipc")
        with (folder / TOKENS).open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = 0
        reader = ipc.open_file(arrow.BufferReader(arrow.py_buffer(self._mapped)))
        parts = [reader.get_batch(place) for place in range(reader.num_record_batches)]
        self._parts = [_Part(part) for part in parts]
        # Where each chunk begins among all completions, and each row.
        self._chunk_starts = np.cumsum([0, *(len(part.marks) for part in self._parts)])
        rows = _joined([part.rows for part in self._parts], np.int64)
        lengths = _joined([part.lengths for part in self._parts], np.int32)
        targets = _joined([part.targets for part in self._parts], np.int32)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self._row_starts = np.append(starts, len(rows))
        self.numbers = rows[starts]
        self.lengths = np.maximum.reduceat(lengths, starts) if len(starts) else lengths
        self.targets = np.add.reduceat(targets, starts) if len(starts) else targets
        self.tokens_of = np.add.reduceat(lengths, starts) if len(starts) else lengths

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        self._let_go()
        first, last = int(self._row_starts[place]), int(self._row_starts[place + 1])
        chunk = int(np.searchsorted(self._chunk_starts, first, side="right")) - 1
        start = int(self._chunk_starts[chunk])
        return self._parts[chunk].row(first - start, last - start)

    def _let_go(self) -> None:
        """Now and then give pages back that were read: at random, most of a file would stay in the process."""
        self._read += 1
        if self._read % KEPT_PAGES == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def tokens(self) -> int:
        """Tokens that are trained, of all rows."""
        return int(self.targets.sum(dtype=np.int64))


class _Part:
    """One record batch: views of the mapped file."""

    def __init__(self, batch: Any) -> None:
        self.rows = batch.column("row").to_numpy()
        self.marks = batch.column("mark").to_numpy()
        self.weights = batch.column("weight").to_numpy()
        self.targets = batch.column("targets").to_numpy()
        self._ids, self._id_ends = _list_views(batch.column("ids"))
        self._spans, self._span_ends = _list_views(batch.column("spans"))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion."""
        return np.diff(self._id_ends)

    def row(self, first: int, last: int) -> EncodedRow:
        """The row whose completions stand here."""
        made = tuple(self._completion(place) for place in range(first, last))
        mark = int(self.marks[first])
        desirable = None if mark in (UNMARKED, PAIRED) else mark == DESIRABLE
        return EncodedRow(made, desirable, mark == PAIRED, float(self.weights[first]))

    def _completion(self, place: int) -> Encoded:
        ids: list[int] = self._ids[self._id_ends[place] : self._id_ends[place + 1]].tolist()
        labels = [IGNORED] * len(ids)
        spans: list[int] = self._spans[self._span_ends[place] : self._span_ends[place + 1]].tolist()
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            labels[start:end] = ids[start:end]
        return Encoded(ids, labels)


UNMARKED, PAIRED, UNDESIRABLE, DESIRABLE = range(4)
"""What a row is, beside its tokens."""


def _list_views(column: Any) -> tuple[np.ndarray, np.ndarray]:
    return column.values.to_numpy(), column.offsets.to_numpy()


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


# -- making ----------------------------------------------------------------------------------------


def token_file(dataset: Artifact, split: Split, labelling: Labelling, context: Context) -> TokenFile:
    """The tokens of a split: those that were made before, or new ones."""
    folder = context.cache / "tokens" / labelling.key(dataset, split)
    if (folder / FACTS).exists():
        try:
            return TokenFile(folder)
        # pyarrow's errors are ValueErrors too.
        except (OSError, ValueError, KeyError):
            context.warn(f"the tokens in {folder} are damaged: they are made again")
            shutil.rmtree(folder)
    if not (folder / FACTS).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        try:
            _write(dataset, split, labelling, made, context)
            # Another stage may have made the same meanwhile.
            if not (folder / FACTS).exists():
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return TokenFile(folder)


def _write(dataset: Artifact, split: Split, labelling: Labelling, out: Path, context: Context) -> None:
    arrow: Any = import_module("pyarrow")
    ipc: Any = import_module("pyarrow.ipc")
    lists = arrow.list_(arrow.field("item", arrow.int32(), nullable=False))
    columns = {
        "row": arrow.int64(),
        "ids": lists,
        "spans": lists,
        "targets": arrow.int32(),
        "mark": arrow.int8(),
        "weight": arrow.float32(),
    }
    schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in columns.items()])
    total: int = dataset.facts["rows"].get(split, 0)
    done = 0
    bad, notes = BadRows(), Counter[str]()
    with ipc.new_file(str(out / TOKENS), schema) as writer:
        for chunk, count in _chunks(iter_rows(dataset, split, CHUNK), labelling, total):
            if len(chunk.rows):
                ends = [arrow.array(item, arrow.int32()) for item in (chunk.id_ends, chunk.span_ends)]
                values = [arrow.array(item, arrow.int32()) for item in (chunk.ids, chunk.spans)]
                ids, spans = (arrow.ListArray.from_arrays(*pair, type=lists) for pair in zip(ends, values, strict=True))
                arrays = [
                    arrow.array(chunk.rows),
                    ids,
                    spans,
                    arrow.array(_targets(chunk)),
                    arrow.array(chunk.marks),
                    arrow.array(chunk.weights),
                ]
                writer.write_batch(arrow.RecordBatch.from_arrays(arrays, schema=schema))
            bad.add(chunk.bad)
            notes.update(chunk.notes)
            done += count
            context.progress(done, total, "rows made tokens")
    facts = {"rows": done, "bad": dict(bad.reasons), "examples": bad.examples, "notes": dict(notes)}
    (out / FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _targets(chunk: _Chunk) -> np.ndarray:
    """Trained tokens of each completion: nothing stands before the first one, to say it from."""
    starts, ends = chunk.spans[::2], chunk.spans[1::2]
    sizes = ends - np.maximum(starts, 1)
    sums = np.concatenate([[0], np.cumsum(np.maximum(sizes, 0))])
    return np.diff(sums[chunk.span_ends // 2]).astype(np.int32)


def _chunks(rows: Iterator[list[Row]], labelling: Labelling, total: int) -> Iterator[tuple[_Chunk, int]]:
    """Chunks of tokens in the order of the rows, and how many rows each was made of."""
    processes = _processes() if total >= AT_LEAST else 1
    first = 0
    if processes == 1:
        encoder = labelling.encoder()
        for some in rows:
            yield _encoded(labelling, encoder, first, some), len(some)
            first += len(some)
        return
    # A fork of a process with running threads may hang: each begins anew.
    around = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, around, _Worker.begin, (labelling,)) as pool:
        waiting: deque[tuple[Future[_Chunk], int]] = deque()
        for some in rows:
            waiting.append((pool.submit(_Worker.work, first, some), len(some)))
            first += len(some)
            # As many in flight as keep everybody busy: the rows of the others stay on disk.
            while len(waiting) > 2 * processes:
                future, count = waiting.popleft()
                yield future.result(), count
        for future, count in waiting:
            yield future.result(), count


def _processes() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Worker:
    """What a process of the pool keeps: the tokenizer is loaded once."""

    labelling: Labelling
    encoder: ChatEncoder

    @classmethod
    def begin(cls, labelling: Labelling) -> None:
        """Called once in each process."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.labelling, cls.encoder = labelling, labelling.encoder()

    @classmethod
    def work(cls, first: int, rows: Sequence[Row]) -> _Chunk:
        """Make tokens of some rows."""
        return _encoded(cls.labelling, cls.encoder, first, rows)


def _encoded(labelling: Labelling, encoder: ChatEncoder, first: int, rows: Sequence[Row]) -> _Chunk:
    bad, notes = BadRows(), Counter[str]()
    numbers: list[int] = []
    ids: list[int] = []
    id_ends, spans, span_ends = [0], list[int](), [0]
    marks: list[int] = []
    weights: list[float] = []
    for number, row in enumerate(rows, first):
        encoder.notes.clear()
        try:
            made = labelling.encode(encoder, row)
        except DataError as error:
            bad.add(BadRows(Counter([error.message]), [(number + 1, quoted(row), error.message, error.hint)]))
            continue
        notes.update(note for note, count in encoder.notes.items() if count)
        mark = PAIRED if made.paired else UNMARKED if made.desirable is None else UNDESIRABLE + made.desirable
        for item in made.completions:
            numbers.append(number)
            marks.append(mark)
            weights.append(made.weight)
            ids += item.input_ids
            id_ends.append(len(ids))
            spans += _spans(item.labels)
            span_ends.append(len(spans))
    return _Chunk(
        rows=np.asarray(numbers, np.int64),
        ids=np.asarray(ids, np.int32),
        id_ends=np.asarray(id_ends, np.int32),
        spans=np.asarray(spans, np.int32),
        span_ends=np.asarray(span_ends, np.int32),
        marks=np.asarray(marks, np.int8),
        weights=np.asarray(weights, np.float32),
        bad=bad,
        notes=notes,
    )


def _spans(labels: Sequence[int]) -> list[int]:
    """Start and end of each run of trained tokens, one after the other."""
    trained = np.asarray(labels) != IGNORED
    return np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()


def quoted(row: Row) -> str:
    """How a row begins: what it is found by in a file."""
    text = " ".join(next(texts_of(row), "").split())
    return f'"{text[:QUOTED]}{"..." if len(text) > QUOTED else ""}"'


class TokenRows(Sequence[EncodedRow]):
    """Chosen rows of several token files.

    Attributes:
        lengths: See `TokenFile`, of the chosen rows.
        targets: See `TokenFile`.
        parts: How many rows are of each file.
    """

    def __init__(self, files: Sequence[TokenFile], kept: Sequence[np.ndarray]) -> None:
        self._files, self._kept = files, kept
        self.parts = [len(item) for item in kept]
        self._starts = np.cumsum([0, *self.parts])
        self.lengths = _joined([file.lengths[item] for file, item in zip(files, kept, strict=True)], np.int32)
        self.targets = _joined([file.targets[item] for file, item in zip(files, kept, strict=True)], np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        which = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[which][int(self._kept[which][place - int(self._starts[which])])]
