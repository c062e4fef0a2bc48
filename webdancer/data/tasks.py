"""Questions: JSONL in the released layout (question, answer, tag), with id and metadata where we add them; and the stream of a run.

{"question": "...", "answer": "..." | ["...", ...] | [["..."]], "tag": "e2hqa", "id": "...", "metadata": {...}}
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from webdancer.data.jsonl import aliases_field, read_rows, text_field, write_rows
from webdancer.errors import DataError
from webdancer.types import Task


def read_tasks(path: str | Path) -> tuple[Task, ...]:
    """All tasks of a file, in its order. Raises DataError with file and line for the first thing wrong.

    A row without an id gets one from its text, so that it stays the same when rows move; the same row again gets a number.
    """
    places: dict[str, str] = {}
    tasks: list[Task] = []
    for place, row in read_rows(Path(path)):
        task = _task(row, place)
        if "id" not in row:
            task = _numbered(task, places)
        elif task.id in places:
            raise DataError(f"{place}: id: must be unique, got {task.id!r} again (first in {places[task.id]})")
        places[task.id] = place
        tasks.append(task)
    return tuple(tasks)


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> int:
    """Write the whole file at once or not at all; returns the number of rows."""
    return write_rows(Path(path), (task_row(task) for task in tasks))


def task_row(task: Task) -> dict[str, Any]:
    """The released keys first, then ours."""
    row: dict[str, Any] = {"question": task.question, "answer": task.answers[0] if len(task.answers) == 1 else list(task.answers)}
    row |= {"tag": task.source, "id": task.id}
    return row | {"metadata": dict(task.metadata)} if task.metadata else row


def num_hops(metadata: Mapping[str, Any]) -> int:
    """What a file of questions says of its hops; 0 where that is no whole number."""
    hops = metadata.get("hops")
    return int(hops) if isinstance(hops, int) or (isinstance(hops, str) and hops.isdecimal()) else 0


def content_id(question: str, answers: Sequence[str]) -> str:
    """An id that says nothing but which question this is."""
    return hashlib.sha256(json.dumps([question, *answers]).encode()).hexdigest()[:16]


class TaskStream:
    """Tasks without end: epoch after epoch, each in an order of its own that only the seed decides.

    The position (`state_dict`) goes into a checkpoint; a stream of the same tasks and seed that loads it goes on with the same tasks.
    """

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        if not tasks:
            raise DataError("tasks: must have at least one task, got none")
        self._tasks = {task.id: task for task in tasks}
        if len(self._tasks) < len(tasks):
            raise DataError(f"tasks: ids must be unique, got {len(tasks)} tasks with {len(self._tasks)} ids")
        self._seed = seed
        self._epoch = 0
        self._index = 0
        self._order = self._shuffled(0)
        self._again: deque[str] = deque()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        if self._again:
            return self._tasks[self._again.popleft()]
        if self._index == len(self._order):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        self._index += 1
        return self._tasks[self._order[self._index - 1]]

    def state_dict(self, untrained: Sequence[str] = ()) -> dict[str, Any]:
        """A position from which the `untrained` ids, given out and never trained on, come again first, in this order."""
        return {
            "seed": self._seed,
            "tasks": self._digest(),
            "epoch": self._epoch,
            "index": self._index,
            "again": [*untrained, *self._again],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises DataError if that was a stream of other tasks or of another seed."""
        if state["tasks"] != self._digest():
            raise DataError(f"tasks: must be those of the checkpoint to resume, got {len(self._tasks)} tasks of which some differ")
        if state["seed"] != self._seed:
            raise DataError(f"seed: must be that of the checkpoint to resume ({state['seed']}), got {self._seed}")
        self._epoch = int(state["epoch"])
        self._index = int(state["index"])
        self._order = self._shuffled(self._epoch)
        self._again = deque(state["again"])

    def _shuffled(self, epoch: int) -> list[str]:
        order = list(self._tasks)
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def _digest(self) -> str:
        return hashlib.sha256("\n".join(self._tasks).encode()).hexdigest()[:16]


def _task(row: Mapping[str, Any], place: str) -> Task:
    question = text_field(row, "question", place)
    answers = aliases_field(row, place)
    source, metadata = row.get("tag", ""), row.get("metadata", {})
    if not isinstance(source, str):
        raise DataError(f"{place}: tag: must be a string, got {type(source).__name__}")
    if not isinstance(metadata, dict):
        raise DataError(f"{place}: metadata: must be an object, got {type(metadata).__name__}")
    id = text_field(row, "id", place) if "id" in row else content_id(question, answers)
    return Task(id=id, question=question, answers=answers, source=source, metadata=metadata)


def _numbered(task: Task, taken: Mapping[str, str]) -> Task:
    if task.id not in taken:
        return task
    number = 2
    while f"{task.id}-{number}" in taken:
        number += 1
    return Task(id=f"{task.id}-{number}", question=task.question, answers=task.answers, source=task.source, metadata=task.metadata)
