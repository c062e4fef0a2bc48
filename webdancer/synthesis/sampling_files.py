"""What sampling leaves behind, written once all questions are settled: whole files, in the order of the questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdancer import __version__
from webdancer.config import Config
from webdancer.data.demonstrations import write_demonstrations
from webdancer.data.jsonl import write_rows
from webdancer.data.tasks import write_tasks
from webdancer.synthesis.attempts import DEMONSTRATED, RESERVED, STATES, AttemptLog, Question, Record
from webdancer.synthesis.manifest import described
from webdancer.whole_file import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFiles:
    """The files by their purpose; runs/sample.py says what is in them."""

    run_dir: Path

    @property
    def folder(self) -> Path:
        return self.run_dir / "sampling"

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts.jsonl"

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def demonstrations(self) -> Path:
        return self.run_dir / "demonstrations.jsonl"

    @property
    def rl_tasks(self) -> Path:
        """The RL pool and the questions that the teacher did not solve."""
        return self.run_dir / "questions" / "rl_pool.jsonl"


def write_files(config: Config, files: SampleFiles, questions: Sequence[Question], log: AttemptLog, *, cost: Mapping[str, Any]) -> None:
    """All files but the report. `log` must not be used afterwards: its file is put in its final order."""
    write_rows(files.questions, (question_row(question) for question in questions))
    reserved = [question.task for question in questions if question.state == RESERVED]
    left = [question.task for question in questions if question.state not in (RESERVED, DEMONSTRATED)]
    write_tasks(files.rl_tasks, [*reserved, *left])
    accepted = [record for question in questions for record in question.accepted]
    write_demonstrations(files.demonstrations, (_released(row) for row in log.rows(accepted)))
    log.close()
    write_rows(files.attempts, log.rows(list(_records(questions))))
    manifest = make_manifest(config, files, questions, cost=cost)
    write_whole(files.manifest, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")


def make_manifest(config: Config, files: SampleFiles, questions: Sequence[Question], *, cost: Mapping[str, Any]) -> dict[str, Any]:
    """What was made, of what, by whom, for how much; all but `cost` is the same for a job that was killed and resumed."""
    stages: dict[str, Counter[str]] = {}
    for record in _records(questions):
        stages.setdefault(record.outcome.stage, Counter())[record.outcome.reason or "passed"] += 1
    states = Counter(question.state for question in questions)
    written = (files.attempts, files.questions, files.demonstrations, files.rl_tasks)
    return {
        "webdancer": __version__,
        "config": {"seed": config.seed, "model": config.model.path, "sample": asdict(config.sample), "prompt": asdict(config.prompt)},
        "questions": {state: states[state] for state in STATES},
        "attempts": {stage: dict(sorted(reasons.items())) for stage, reasons in sorted(stages.items())},
        "demonstrations": sum(len(question.accepted) for question in questions),
        "files": {str(path.relative_to(files.run_dir)): described(path) for path in written},
        "cost": dict(cost),
    }


def question_row(question: Question) -> dict[str, Any]:
    kind = {name: question.task.metadata[name] for name in ("type", "hops") if name in question.task.metadata}
    return {
        "id": question.task.id,
        "question": question.task.question,
        "tag": question.task.source,
        **kind,
        "state": question.state,
        "attempts": [record.outcome.reason or record.outcome.stage for record in question.records],
        "demonstrations": [record.id for record in question.accepted],
    }


def counts(questions: Sequence[Question]) -> dict[str, int]:
    """episodes, accepted, and the others by the reason at which they ended, most first."""
    kept = {record.id for question in questions for record in question.accepted}
    reasons = Counter(record.outcome.reason or "surplus" for record in _records(questions) if record.id not in kept)
    return {"episodes": sum(1 for _ in _records(questions)), "accepted": len(kept), **dict(reasons.most_common())}


def told(questions: Sequence[Question]) -> str:
    """The counts in a line."""
    found = counts(questions)
    episodes, accepted = found.pop("episodes"), found.pop("accepted")
    rejected = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in found.items())
    left = sum(question.state not in (RESERVED, DEMONSTRATED) for question in questions)
    return f"{episodes} episodes: {rejected or 'none rejected'}; {accepted} kept; {left} questions join the RL pool"


def _records(questions: Sequence[Question]) -> Iterator[Record]:
    return (record for question in questions for record in question.records)


def _released(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is only ours; the id stays."""
    return {name: value for name, value in row.items() if name != "sampling"}
