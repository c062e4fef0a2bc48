"""Questions: the released layout and ours, errors with a line, a stream that resumes exactly."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.data.jsonl import write_rows
from webdancer.data.tasks import TaskStream, read_tasks, write_tasks
from webdancer.errors import DataError
from webdancer.types import Task

ROW = {"question": "Why?", "answer": "So.", "tag": "e2hqa"}


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_released_and_extended_rows(tmp_path):
    rows = [ROW, {**ROW, "answer": ["So.", "Thus."]}, {**ROW, "answer": [["So."]]}, {"id": "q7", "metadata": {"hops": 2}, **ROW}]
    tasks = read_tasks(write(tmp_path / "qa.jsonl", rows[0], b"", *rows[1:], b"  "))
    assert [task.answers for task in tasks] == [("So.",), ("So.", "Thus."), ("So.",), ("So.",)]
    assert [task.source for task in tasks] == ["e2hqa"] * 4
    assert (tasks[3].id, tasks[3].metadata) == ("q7", {"hops": 2})
    assert len({task.id for task in tasks}) == 4
    assert tasks[2].id == f"{tasks[0].id}-2"


def test_ids_come_from_the_text_not_the_place(tmp_path):
    other = {**ROW, "question": "How?"}
    first = read_tasks(write(tmp_path / "a.jsonl", ROW, other))
    second = read_tasks(write(tmp_path / "b.jsonl", other, ROW))
    assert [task.id for task in first] == [task.id for task in reversed(second)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "must be JSON in UTF-8"),
        (b"\xff\xfe", "must be JSON in UTF-8"),
        ({**ROW, "question": "Who \ud83d is it?"}, "must be JSON in UTF-8, got: 'utf-8' codec can't encode"),
        (b"[" * 100_000, "must be JSON in UTF-8"),
        ([1], "must be a JSON object, got list"),
        ({"answer": "x"}, "question: must be a non-empty string, got None"),
        ({**ROW, "question": "  "}, "question: must be a non-empty string, got '  '"),
        ({**ROW, "question": 3}, "question: must be a non-empty string, got 3"),
        ({"question": "x"}, "answer: must be a non-empty string or lists of them, got None"),
        ({**ROW, "answer": []}, "answer: must have at least one alias"),
        ({**ROW, "answer": ["x", ""]}, "answer: must be a non-empty string"),
        ({**ROW, "answer": [[["x"]]]}, "answer: must be a non-empty string"),
        ({**ROW, "tag": 1}, "tag: must be a string, got int"),
        ({**ROW, "metadata": []}, "metadata: must be an object, got list"),
        ({**ROW, "id": ""}, "id: must be a non-empty string"),
        ({**ROW, "id": "first"}, "id: must be unique, got 'first' again"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "qa.jsonl", {"id": "first", **ROW}, b"", line, ROW)
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}, line 3: {message}")


def test_no_file_and_an_empty_file(tmp_path):
    with pytest.raises(DataError, match="must be a readable file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="must be a readable file"):
        read_tasks(tmp_path)
    with pytest.raises(DataError, match="must have at least one row"):
        read_tasks(write(tmp_path / "empty.jsonl", b"\n \n"))


tasks_lists = st.lists(
    st.builds(
        Task,
        id=st.text(min_size=1).filter(str.strip),
        question=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        answers=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, unique=True).map(
            tuple
        ),
        source=st.text(),
        metadata=st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda task: task.id,
)


@given(tasks_lists)
def test_what_is_written_reads_back(tmp_path_factory, tasks):
    try:
        json.dumps([(t.id, t.source, t.metadata) for t in tasks], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    path = tmp_path_factory.mktemp("tasks") / "new" / "qa.jsonl"
    assert write_tasks(path, tasks) == len(tasks)
    assert read_tasks(path) == tuple(tasks)


def test_half_a_surrogate_pair_is_never_written(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{**ROW, "question": "Who \ud83d is \U0001f600?"}])
    assert read_tasks(tmp_path / "a.jsonl")[0].question == "Who ? is \U0001f600?"
    assert read_tasks(write(tmp_path / "b.jsonl", {**ROW, "question": "\U0001f600"}))[0].question == "\U0001f600"


def test_a_byte_order_mark_and_unicode_line_ends_are_read(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**ROW, "question": "a\u2028b\x85c"}, ensure_ascii=False).encode() + b"\r\n")
    assert read_tasks(path)[0].question == "a\u2028b\x85c"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "qa.jsonl", ROW)
    before = path.read_bytes()

    def rows():
        yield ROW
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        write_rows(path, rows())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [{"x": float("nan")}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def make_tasks(count):
    return [Task(id=f"t{index}", question="?", answers=("x",)) for index in range(count)]


def ids(stream, count):
    return [task.id for task in itertools.islice(stream, count)]


def test_every_epoch_has_every_task_in_an_order_of_its_own():
    given_out = ids(TaskStream(make_tasks(20), seed=1), 60)
    epochs = [given_out[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(f"t{index}" for index in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(TaskStream(make_tasks(20), seed=1), 60) == given_out
    assert ids(TaskStream(make_tasks(20), seed=2), 60) != given_out


@given(count=st.integers(1, 7), before=st.integers(0, 30), held=st.integers(0, 5), seed=st.integers(0, 3))
def test_a_resumed_stream_goes_on_with_the_same_tasks(count, before, held, seed):
    stream = TaskStream(make_tasks(count), seed=seed)
    given_out = ids(stream, before)
    untrained = given_out[-held:] if held else []
    state = json.loads(json.dumps(stream.state_dict(untrained)))
    resumed = TaskStream(make_tasks(count), seed=seed)
    resumed.load_state_dict(state)
    # A second interruption while the untrained are given out again loses none of them.
    first = ids(resumed, min(2, len(untrained)))
    again = TaskStream(make_tasks(count), seed=seed)
    again.load_state_dict(resumed.state_dict(first))
    following = ids(stream, 15)
    assert first + ids(resumed, 15 + len(untrained) - len(first)) == untrained + following
    assert ids(again, 15 + len(untrained)) == untrained + following


def test_a_stream_of_other_tasks_or_seed_does_not_resume():
    state = TaskStream(make_tasks(3), seed=1).state_dict()
    with pytest.raises(DataError, match="tasks: must be those of the checkpoint"):
        TaskStream(make_tasks(4), seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="seed: must be that of the checkpoint"):
        TaskStream(make_tasks(3), seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="ids must be unique"):
        TaskStream([*make_tasks(2), *make_tasks(1)], seed=1)
    with pytest.raises(DataError, match="at least one task"):
        TaskStream([], seed=1)
