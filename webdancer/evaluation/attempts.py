"""One episode of a benchmark: what became of it, in figures; and the rounds on disk, which a stopped run goes on from.

    DIR/iter1.jsonl ...      a row an episode, in the layout of the released evaluation (question, answer, prediction, messages,
                             termination, rollout_id, is_correct, judgement) with our id and figures beside
    DIR/settings.json        what all rounds were sampled with
    DIR/result.json          the figures (runs/benchmark.py)

Rows are found again by question id. Of an encrypted benchmark the texts are sealed (ciphers.seal): nothing plain is on disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webdancer.config import PromptConfig
from webdancer.data.demonstrations import trajectory_to_row
from webdancer.data.tasks import content_id
from webdancer.errors import ConfigError, DataError
from webdancer.evaluation.benchmarks import CANARY
from webdancer.evaluation.ciphers import seal, unseal
from webdancer.telemetry.jsonl import JsonlWriter, read_jsonl
from webdancer.types import ScoredTrajectory, StopReason, Task, ToolCall, Verdict, VerdictStatus, by_provider
from webdancer.whole_file import write_whole

SETTINGS_FILE = "settings.json"
LABELS = ("level", "type", "difficulty", "language", "hops", "topic", "domain")
"""Of Task.metadata: what figures are broken down by."""
NO_ANSWER = "No answer found."
_JUDGEMENTS: Mapping[str, str] = {"correct": "Correct", "wrong": "Incorrect", "unknown": "Error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """`unknown` (judge or infrastructure failed) counts in no accuracy, and is run or judged again when the run goes on."""

    task_id: str
    round: int
    """From 1."""
    status: VerdictStatus
    stop: str
    answer: str | None = None
    reason: str = ""
    judge: str = ""
    well_formed: bool = False
    num_actions: int = 0
    """Turns of the policy."""
    calls: Mapping[str, int] = field(default_factory=dict)
    """By tool."""
    num_tokens: int = 0
    num_policy_tokens: int = 0
    usd: float = 0.0
    """Of its tools."""
    judge_requests: int = 0
    judge_tokens: int = 0
    """Prompt and reply of all verdicts that were asked for."""
    judge_usd: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_judge_only(self) -> bool:
        """The episode is fine and its verdict is missing."""
        return self.status == "unknown" and self.answer is not None and self.judge not in ("", "none")


def attempt_of(task: Task, round: int, scored: ScoredTrajectory | None) -> Attempt:
    """None is an episode that was lost with its worker."""
    if scored is None:
        return Attempt(task_id=task.id, round=round, status="unknown", stop=str(StopReason.FAILED), reason="lost", labels=labels(task))
    trajectory, verdict = scored.trajectory, scored.verdict
    plain = Attempt(
        task_id=task.id,
        round=round,
        status="unknown",
        stop=str(trajectory.stop),
        answer=trajectory.answer,
        well_formed=scored.reward.format > 0,
        num_actions=len(trajectory.turns),
        calls=Counter(turn.action.name for turn in trajectory.turns if isinstance(turn.action, ToolCall)),
        num_tokens=len(trajectory.token_ids),
        num_policy_tokens=trajectory.num_policy_tokens,
        usd=sum(use.usd for use in by_provider(trajectory.tool_uses).values()),
        labels=labels(task),
    )
    judged = verdict_of(plain, verdict)
    return judged if scored.reward.valid else dataclasses.replace(judged, status="unknown")


def and_paid_before(attempt: Attempt, before: Attempt | None) -> Attempt:
    """An attempt that was made again, with the money of the one before it."""
    if before is None:
        return attempt
    return dataclasses.replace(
        attempt,
        usd=attempt.usd + before.usd,
        judge_requests=attempt.judge_requests + before.judge_requests,
        judge_tokens=attempt.judge_tokens + before.judge_tokens,
        judge_usd=attempt.judge_usd + before.judge_usd,
    )


def labels(task: Task) -> dict[str, str]:
    return {name: str(task.metadata[name]) for name in LABELS if task.metadata.get(name) not in (None, "", 0)}


class RoundFiles:
    """The rows of a benchmark's rounds; of an episode that was run again the last one counts. Close it."""

    def __init__(self, directory: Path, tasks: Sequence[Task], *, rounds: int, settings: Mapping[str, Any], prompt: PromptConfig) -> None:
        """Raises ConfigError where rounds of other settings, DataError where rows of other questions are there already."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        _claim(directory / SETTINGS_FILE, settings)
        self._prompt = prompt
        self._tasks = {task.id: task for task in tasks}
        self._found: dict[tuple[int, str], Attempt] = {}
        for round in range(1, rounds + 1):
            for place, attempt, row in _attempts(directory, round):
                if attempt.task_id in self._tasks:
                    self._found[round, attempt.task_id] = self._checked(place, attempt, row)
        self._writers = {round: JsonlWriter(_path(directory, round)) for round in range(1, rounds + 1)}

    def found(self, task: Task, round: int) -> Attempt | None:
        """What an earlier start has written."""
        return self._found.get((round, task.id))

    def write(self, attempt: Attempt, scored: ScoredTrajectory | None) -> None:
        """Raises ServiceError where the disk takes no more."""
        messages = [] if scored is None else trajectory_to_row(scored.trajectory, prompt=self._prompt)["messages"]
        self._writers[attempt.round].write(_row(self._tasks[attempt.task_id], attempt, messages))

    def write_again(self, attempt: Attempt) -> None:
        """The row of an earlier start, with the verdict that the attempt has now."""
        path = _path(self.directory, attempt.round)
        before = [row for row in read_jsonl(path) if row.get("id") == attempt.task_id][-1]
        task = self._tasks[attempt.task_id]
        self._writers[attempt.round].write(_row(task, attempt, unsealed(before, str(path))["messages"]))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _checked(self, place: str, attempt: Attempt, row: Mapping[str, Any]) -> Attempt:
        task = self._tasks[attempt.task_id]
        if row.get("content") != content_id(task.question, task.answers):
            raise DataError(f"{place}: id: must be of the same question as in the benchmark's file, got {attempt.task_id!r} of another one")
        return attempt


def read_attempts(directory: Path) -> tuple[Attempt, ...]:
    """All rounds, the last row of each episode. Raises DataError where there are none."""
    return tuple(attempt for attempt, _ in read_judged(directory))


def read_judged(directory: Path) -> tuple[tuple[Attempt, Task], ...]:
    """As `read_attempts`, each with its question and answers, in memory."""
    found: dict[tuple[int, str], tuple[Attempt, Task]] = {}
    for path in sorted(directory.glob("iter*.jsonl")):
        number = path.stem.removeprefix("iter")
        for place, attempt, row in _attempts(directory, int(number)) if number.isdigit() else ():
            found[attempt.round, attempt.task_id] = attempt, _task(unsealed(row, place), attempt, place)
    if not found:
        raise DataError(f"{directory}: must be a benchmark's directory with iter1.jsonl, got none there")
    return tuple(found[key] for key in sorted(found))


def settings_that_differ(first: Path, second: Path) -> list[str]:
    """Of two evaluations, `NAME: ONE and OTHER`; not the model, which is what is compared."""
    ours, theirs = (_settings_of(directory) for directory in (first, second))
    names = [name for name in {**ours, **theirs} if name != "model"]
    return [f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in names if ours.get(name) != theirs.get(name)]


def _settings_of(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS_FILE
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path}: must be what an evaluation wrote, got: {error}") from error
    return dict(found)


def unsealed(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        return unseal(row)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: must be a row that was sealed with its {CANARY}, got something else") from error


def _attempts(directory: Path, round: int) -> Iterator[tuple[str, Attempt, dict[str, Any]]]:
    path = _path(directory, round)
    names = {one.name for one in dataclasses.fields(Attempt)}
    for number, row in enumerate(read_jsonl(path), start=1):
        place = f"{path}, line {number}"
        try:
            fields = {**row["figures"], **unsealed(row, place).get("verdict", {})}
            attempt = Attempt(task_id=row["id"], round=round, **{name: value for name, value in fields.items() if name in names})
        except (KeyError, TypeError) as error:
            raise DataError(f"{place}: must be a row of a benchmark's round, got none ({error!r})") from error
        yield place, attempt, row


def _row(task: Task, attempt: Attempt, messages: Sequence[Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {
        "question": task.question,
        "answer": task.answers[0] if len(task.answers) == 1 else list(task.answers),
        "prediction": attempt.answer if attempt.answer is not None else NO_ANSWER,
        "messages": list(messages),
        "verdict": {"answer": attempt.answer, "reason": attempt.reason, "judge": attempt.judge},
    }
    figures = dataclasses.asdict(attempt)
    for name in ("task_id", "round", *texts["verdict"]):
        del figures[name]
    row = {
        "termination": _termination(attempt),
        "rollout_id": attempt.round,
        "is_correct": attempt.status == "correct",
        "judgement": _JUDGEMENTS[attempt.status],
        "id": task.id,
        "source": task.source,
        "content": content_id(task.question, task.answers),
        "figures": {**figures, "calls": dict(attempt.calls)},
    }
    canary = task.metadata.get(CANARY)
    return {**row, **seal(texts, canary)} if canary else {**texts, **row}


def _task(row: Mapping[str, Any], attempt: Attempt, place: str) -> Task:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str | list):
        raise DataError(f"{place}: question, answer: must be there")
    answers = (answer,) if isinstance(answer, str) else tuple(answer)
    return Task(id=attempt.task_id, question=question, answers=answers, source=str(row.get("source", "")))


def _termination(attempt: Attempt) -> str:
    """In the words of the released evaluation."""
    if attempt.stop in (StopReason.MAX_TURNS, StopReason.TOOL_BUDGET):
        return "exceed available llm calls"
    if attempt.stop == StopReason.MAX_TOKENS:
        return ("" if attempt.answer is not None else "format error: ") + "generate an answer as token limit reached"
    return "answer" if attempt.stop == StopReason.ANSWERED else "answer not found"


def _path(directory: Path, round: int) -> Path:
    return directory / f"iter{round}.jsonl"


def _claim(path: Path, settings: Mapping[str, Any]) -> None:
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: must be what an evaluation wrote, got: {error}") from error
    changed = [f"{name}: {before.get(name)!r} there, {value!r} here" for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ConfigError(f"{path.parent}: holds rounds of other settings ({'; '.join(changed)}); choose another name or run_dir")


def verdict_of(attempt: Attempt, verdict: Verdict) -> Attempt:
    """The attempt with this verdict; what those before it took is added to."""
    use = verdict.use
    return dataclasses.replace(
        attempt,
        status=verdict.status,
        reason=verdict.reason,
        judge=verdict.judge,
        judge_requests=attempt.judge_requests + use.requests,
        judge_tokens=attempt.judge_tokens + use.prompt_tokens + use.completion_tokens,
        judge_usd=attempt.judge_usd + use.usd,
    )
