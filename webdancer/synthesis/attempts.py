"""Every attempt of a teacher at a question, one line each, written as it ends: a job that is killed loses what was in flight, no more.

A line is a trajectory in the released layout, and beside it what became of it:

    {"type": "chatml", ..., "id": "q7/1/1", "sampling": {"task": "q7", "attempt": 1, "stage": "quality", "reason": "redundant_call", ...}}

Lines stand in the order in which attempts ended; `settle` puts them in the order of the questions, so that a job that was killed and
resumed ends with the very same files as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdancer.config import PromptConfig, SampleConfig
from webdancer.data.demonstrations import trajectory_to_row
from webdancer.errors import DataError
from webdancer.synthesis.funnel import Attempt, Outcome, attempt_of
from webdancer.telemetry.jsonl import JsonlWriter, read_placed
from webdancer.types import ScoredTrajectory, Task

State = str
DEMONSTRATED, UNSOLVED, UNDECIDED, NOT_NEEDED, RESERVED = "demonstrated", "unsolved", "undecided", "not_needed", "reserved"
STATES = (DEMONSTRATED, UNSOLVED, UNDECIDED, NOT_NEEDED, RESERVED)
"""Of a question. undecided: a tool, judge or checker was away, so that no attempt says that it is too hard. not_needed: there were enough
demonstrations. reserved: for RL from the start. All but the first are RL's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is remembered of an attempt's line, and where that begins."""

    id: str
    task_id: str
    attempt: int
    outcome: Outcome
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question's state after sampling, its attempts that count, and those among them that are demonstrations."""

    task: Task
    state: State
    records: tuple[Record, ...] = ()
    accepted: tuple[Record, ...] = ()


class AttemptLog:
    """Opening reads what earlier starts wrote. What an outage took is forgotten, and so tried again."""

    def __init__(self, path: Path, *, keep: str) -> None:
        """keep: sample.keep. Raises DataError for a file that is not such a log; a torn last line is cut off."""
        self.path = path
        self._writer = JsonlWriter(path)
        self._records: dict[str, dict[int, Record]] = {}
        for offset, row in read_placed(path):
            record = _record(row, offset, path)
            if not record.outcome.is_undecided or record.outcome.is_kept(keep):
                self._records.setdefault(record.task_id, {})[record.attempt] = record

    def of(self, task: Task) -> tuple[Record, ...]:
        """Attempts at a question, in their order."""
        return tuple(record for _, record in sorted(self._records.get(task.id, {}).items()))

    def add(self, scored: ScoredTrajectory, outcome: Outcome, *, attempt: int, prompt: PromptConfig) -> Record:
        row = attempt_row(scored, outcome, attempt=attempt, prompt=prompt)
        record = _record(row, self._writer.write(row), self.path)
        self._records.setdefault(record.task_id, {})[attempt] = record
        return record

    def rows(self, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for record in records:
                file.seek(record.offset)
                yield json.loads(file.readline())

    def close(self) -> None:
        self._writer.close()


def attempt_row(scored: ScoredTrajectory, outcome: Outcome, *, attempt: int, prompt: PromptConfig) -> dict[str, Any]:
    """Nothing in it depends on when or how fast the attempt was made."""
    trajectory = scored.trajectory
    seen: Attempt = attempt_of(scored)
    kind = {name: trajectory.task.metadata[name] for name in ("type", "hops") if name in trajectory.task.metadata}
    sampling = {
        "task": trajectory.task.id,
        "attempt": attempt,
        "stage": outcome.stage,
        "reason": outcome.reason,
        "detail": outcome.detail,
        "stop": str(trajectory.stop),
        "answer": trajectory.answer,
        "verdict": scored.verdict.status,
        "judge": scored.verdict.judge,
        "num_tokens": len(trajectory.token_ids),
        "num_policy_tokens": trajectory.num_policy_tokens,
        "num_actions": seen.num_actions,
        "actions": [call.name for call, _ in seen.calls],
    }
    return {**trajectory_to_row(trajectory, prompt=prompt), "sampling": sampling | kind}


def settle(tasks: Sequence[Task], reserved: Sequence[Task], log: AttemptLog, config: SampleConfig) -> tuple[Question, ...]:
    """Each question with its state: the teacher's in their order, then the reserved ones.

    Demonstrations are the first `max_demonstrations` in the order of the questions. Attempts at later ones were begun only because
    several questions are tried at once; they are not counted, so that the result does not depend on how fast episodes were.
    """
    left = config.max_demonstrations or None
    questions: list[Question] = []
    for task in tasks:
        if left is not None and left <= 0:
            questions.append(Question(task=task, state=NOT_NEEDED))
            continue
        records = log.of(task)
        accepted = tuple(record for record in records if record.outcome.is_kept(config.keep))[:left]
        left = left if left is None else left - len(accepted)
        questions.append(Question(task=task, state=_state(records, accepted), records=records, accepted=accepted))
    return (*questions, *(Question(task=task, state=RESERVED) for task in reserved))


def _state(records: Sequence[Record], accepted: Sequence[Record]) -> State:
    if accepted:
        return DEMONSTRATED
    return UNDECIDED if all(record.outcome.is_undecided for record in records) else UNSOLVED


def _record(row: Mapping[str, Any], offset: int, path: Path) -> Record:
    try:
        told = row["sampling"]
        outcome = Outcome(stage=told["stage"], reason=told["reason"], detail=told["detail"])
        return Record(id=row["id"], task_id=told["task"], attempt=told["attempt"], outcome=outcome, offset=offset)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: must hold attempts of `webdancer sample`, got a line without {error}") from error
