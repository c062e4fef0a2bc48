"""The benchmarks of the field as tasks, out of the files that their authors publish.

    gaia                 text-only questions; the 103 of the papers are WebThinker's data/GAIA/dev.json, without attached files
    webwalkerqa          680 questions in English and Chinese
    browsecomp           1,266 questions, encrypted          browsecomp-zh   289, encrypted
    xbench-deepsearch    100 questions, encrypted            simpleqa        4,326 short facts
    hotpotqa, 2wikimultihopqa, musique, bamboogle            as Search-R1 uses them (FlashRAG's files, or Search-R1's own parquet)
    jsonl                any file in the released layout (data/tasks.py)

Encrypted ones are decrypted here, in memory; a task of one carries its key (`metadata["canary"]`), and what is written about it is sealed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from webdancer.data.tasks import content_id, read_tasks
from webdancer.errors import DataError
from webdancer.evaluation.ciphers import Cipher, decrypt
from webdancer.evaluation.table_files import located, rows
from webdancer.types import Task

Row = Mapping[str, Any]
CANARY = "canary"
UNPUBLISHED = "?"
"""The answer of a test split that keeps its answers (GAIA)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A file layout. Of several column names the first that is there counts; a dotted name leads into an object."""

    name: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    id: tuple[str, ...] = ()
    """Where a row has none, its id is made of question and answer."""
    metadata: Mapping[str, tuple[str, ...]]
    """What it is broken down by (level, type, difficulty, language, topic, ...) -> columns."""
    cipher: Cipher | None = None
    encrypted: tuple[str, ...] = ()
    num_questions: int = 0
    """Of the set that papers report; another number is no error, but said."""
    hub: str = ""
    """Where the hub has it: owner/name/file."""
    text_only: tuple[str, ...] = ()
    """Rows with something in one of these columns have an attached file, and are left out."""
    one_of: str = ""
    """Rows of other data sets (in this column) are left out."""


def _search_r1(name: str, file: str, num_questions: int) -> Benchmark:
    """A row of FlashRAG's files, or of Search-R1's parquet, which has several data sets in one file."""
    return Benchmark(
        name=name,
        question=("question",),
        answer=("golden_answers", "reward_model.ground_truth.target"),
        id=("id",),
        metadata={"type": ("metadata.type", "extra_info.type"), "level": ("metadata.level",)},
        num_questions=num_questions,
        hub=f"RUC-NLPIR/FlashRAG_datasets/{file}",
        one_of="data_source",
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="gaia",
            question=("Question", "question"),
            answer=("Final answer", "answer"),
            id=("task_id", "id"),
            metadata={"level": ("Level", "level")},
            num_questions=103,
            text_only=("file_name", "file_path"),
        ),
        Benchmark(
            name="webwalkerqa",
            question=("question", "Question"),
            answer=("answer", "Answer"),
            id=("id",),
            metadata={
                "type": ("info.type", "Info.Hop"),
                "difficulty": ("info.difficulty_level", "Info.Difficulty_Level"),
                "language": ("info.lang", "Info.Language"),
                "domain": ("info.domain", "Info.Domain"),
            },
            num_questions=680,
            hub="callanwu/WebWalkerQA/data/main-00000-of-00001.jsonl",
        ),
        Benchmark(
            name="browsecomp",
            question=("problem",),
            answer=("answer",),
            metadata={"topic": ("problem_topic",)},
            cipher="sha256",
            encrypted=("problem", "answer"),
            num_questions=1266,
        ),
        Benchmark(
            name="browsecomp-zh",
            question=("Question",),
            answer=("Answer",),
            metadata={"topic": ("Topic",)},
            cipher="sha256",
            encrypted=("Topic", "Question", "Answer"),
            num_questions=289,
        ),
        Benchmark(
            name="xbench-deepsearch",
            question=("prompt",),
            answer=("answer",),
            id=("id",),
            metadata={"type": ("type",)},
            cipher="raw",
            encrypted=("prompt", "answer"),
            num_questions=100,
        ),
        Benchmark(
            name="simpleqa",
            question=("problem",),
            answer=("answer",),
            metadata={"type": ("metadata.answer_type",), "topic": ("metadata.topic",)},
            num_questions=4326,
        ),
        _search_r1("hotpotqa", "hotpotqa/dev.jsonl", 7405),
        _search_r1("2wikimultihopqa", "2wikimultihopqa/dev.jsonl", 12576),
        _search_r1("musique", "musique/dev.jsonl", 2417),
        _search_r1("bamboogle", "bamboogle/test.jsonl", 125),
    )
}
OWN = "jsonl"
NAMES = (*BENCHMARKS, OWN)


def load_benchmark(name: str, source: str = "") -> tuple[Task, ...]:
    """All questions of the file, in its order. Raises DataError with file and row for the first thing that is wrong with it.

    source: a file, or a data set on the hub (table_files.located); empty: where the hub has it. Task.source is the benchmark's name.
    """
    if name == OWN:
        if not source:
            raise DataError("evaluation.data: must name a file of questions for the benchmark jsonl, got ''")
        return read_tasks(source)
    if name not in BENCHMARKS:
        raise DataError(f"evaluation.benchmark: must be one of {', '.join(NAMES)}, got {name!r}")
    benchmark = BENCHMARKS[name]
    if not (source or benchmark.hub):
        raise DataError(f"evaluation.data: must name the file of {name}, which no open data set on the hub has, got ''")
    file = "/".join(benchmark.hub.split("/")[2:])
    tasks = tuple(_numbered(_tasks(benchmark, located(source or f"hf://datasets/{benchmark.hub}", default_file=file))))
    if not tasks:
        raise DataError(f"{source or benchmark.hub}: must have questions of {name} without attached files, got none")
    return tasks


def load_evaluation_set(entry: str) -> tuple[Task, ...]:
    """The questions of `NAME=SOURCE` or `NAME`, as load_benchmark takes them, or of a file of one's own. Raises DataError."""
    name, named, source = entry.partition("=")
    if name in NAMES:
        return load_benchmark(name, source)
    if named and not Path(entry).exists():
        raise DataError(f"{entry}: must be a file, or NAME=FILE with a benchmark of {', '.join(NAMES)}, got the name {name!r}")
    return read_tasks(entry)


def size_note(name: str, num_tasks: int) -> str:
    """What to say about a file that is not the set of the papers; empty where it is."""
    expected = BENCHMARKS[name].num_questions if name in BENCHMARKS else 0
    if expected in (0, num_tasks):
        return ""
    return f"{name}: {num_tasks} questions, where papers report on {expected}: figures cannot be compared with theirs as they are"


def _tasks(benchmark: Benchmark, path: Path) -> Iterator[tuple[str, Task, bool]]:
    """(place, task, whether its id is the benchmark's own)."""
    for place, written in rows(path):
        row = _with_objects(written)
        if benchmark.one_of and _value(row, (benchmark.one_of,)) not in (None, "", benchmark.name):
            continue
        if any(_value(row, (column,)) for column in benchmark.text_only):
            continue
        yield place, *_task(benchmark, _decrypted(benchmark, row, place), place)


def _task(benchmark: Benchmark, row: Row, place: str) -> tuple[Task, bool]:
    question = _text(row, benchmark.question, place)
    answers = _answers(row, benchmark.answer, place)
    metadata = {name: _label(value) for name, columns in benchmark.metadata.items() if (value := _value(row, columns)) not in (None, "")}
    if benchmark.cipher:
        metadata[CANARY] = row[CANARY]
    given = _label(_value(row, benchmark.id) or "")
    id = given or content_id(question, answers)
    return Task(id=id, question=question, answers=answers, source=benchmark.name, metadata=metadata), bool(given)


def _numbered(found: Iterator[tuple[str, Task, bool]]) -> Iterator[Task]:
    """Ids are the benchmark's own, and must be unique; of rows that are the same, each gets a number."""
    places: dict[str, str] = {}
    for place, task, own_id in found:
        if own_id and task.id in places:
            raise DataError(f"{place}: id: must be unique, got {task.id!r} again (first in {places[task.id]})")
        base, number = task.id, 2
        while task.id in places:
            task, number = replace(task, id=f"{base}-{number}"), number + 1
        places[task.id] = place
        yield task


def _decrypted(benchmark: Benchmark, row: Row, place: str) -> Row:
    if benchmark.cipher is None:
        return row
    canary = row.get(CANARY)
    if not isinstance(canary, str) or not canary:
        raise DataError(f"{place}: {CANARY}: must be the key of the row, got {_shown(canary)}; a plain file is benchmark jsonl")
    plain = dict(row)
    for column in benchmark.encrypted:
        if row.get(column) is None and column not in (*benchmark.question, *benchmark.answer):
            continue
        try:
            plain[column] = decrypt(str(_required(row, (column,), place)).strip(), canary, benchmark.cipher)
        except ValueError as error:  # of base64 and of UTF-8
            raise DataError(f"{place}: {column}: must be base64 of text encrypted with the row's {CANARY}, got something else") from error
    return plain


def _with_objects(row: Row) -> Row:
    """Columns that hold an object as text, in JSON or as Python writes it (SimpleQA's metadata), as that object."""
    plain = dict(row)
    for name in ("metadata", "info", "Info", "extra_info", "reward_model"):
        value = plain.get(name)
        if not isinstance(value, str) or not value.strip().startswith("{"):
            continue
        try:
            plain[name] = json.loads(value) if value.strip().startswith('{"') else ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # it only says what kind of question this is
    return plain


def _value(row: Row, columns: Sequence[str]) -> Any:
    """The first of these columns that is there, or None."""
    for column in columns:
        value: Any = row
        for name in column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _required(row: Row, columns: Sequence[str], place: str) -> Any:
    value = _value(row, columns)
    if value is None or value == "":
        there = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place}: {' or '.join(columns)}: must be there and not empty; the columns are {there}")
    return value


def _text(row: Row, columns: Sequence[str], place: str) -> str:
    value = _required(row, columns, place)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {' or '.join(columns)}: must be a text, got {_shown(value)}")
    return value


def _answers(row: Row, columns: Sequence[str], place: str) -> tuple[str, ...]:
    value = _required(row, columns, place)
    listed = list(value) if isinstance(value, list | tuple) else [value]
    aliases = tuple(dict.fromkeys(_label(alias) for alias in listed if isinstance(alias, str | int | float) and _label(alias)))
    if aliases == (UNPUBLISHED,):
        raise DataError(f"{place}: {' or '.join(columns)}: must be published, got {UNPUBLISHED!r}; use a split that has its answers")
    if not aliases or len(listed) != sum(isinstance(alias, str | int | float) for alias in listed):
        raise DataError(f"{place}: {' or '.join(columns)}: must be an answer or a list of them, got {_shown(value)}")
    return aliases


def _label(value: Any) -> str:
    """Spreadsheets make numbers of what looks like one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _shown(value: Any) -> str:
    """Its kind only: an encrypted benchmark's plain text is in no error."""
    return "nothing" if value is None else f"a {type(value).__name__}"
